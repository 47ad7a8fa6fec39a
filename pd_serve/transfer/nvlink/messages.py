"""What two nvlink transports say to each other: descriptions in the handshake, the rest over the peer channel.

Only plain data: encoded, decoded and checked here, used by the transport. A description holds nothing that opens
memory, for a decode node sends its own before it knows who listens; that travels in an :class:`Offer`, which a source
sends to a reader that has authenticated itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from pd_serve.errors import FailureKind, HandshakeError, TransferError

MAX_SEGMENTS = 512  # of one pool; a pool is one allocation, or a few
TOKEN_BYTES = 32

Address = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
Size = Annotated[int, msgspec.Meta(ge=1, lt=2**48)]


class Kind(StrEnum):
    """How a source hands its pool over."""

    POSIX_FD = "posix_fd"  # cumem, descriptors over a Unix socket
    FABRIC = "fabric"  # cumem, handles in the offer; also across the machines of an MNNVL domain
    IPC = "ipc"  # cudaMalloc memory, legacy cudaIpc handles in the offer
    NONE = "none"  # not at all: it can read, but not be read


class Description(msgspec.Struct, frozen=True):
    """``Transport.describe()``."""

    kind: Kind
    boot_id: str  # of the machine's kernel; empty where it has none
    why_not: str = ""  # with NONE


class Want(msgspec.Struct, frozen=True, tag="want"):
    """Reader to source: open your pool to me."""


class Range(msgspec.Struct, frozen=True, array_like=True):
    """One allocation of the source, in its addresses."""

    address: Address
    size_bytes: Size
    handle: bytes = b""  # fabric or cudaIpc; empty: the descriptor with the same index


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Source to reader: what opens the pool. Valid until the session ends."""

    source: bytes  # stands for this pool: the same in all offers of one transport, in no other's
    kind: Kind
    ranges: Annotated[list[Range], msgspec.Meta(min_length=1, max_length=MAX_SEGMENTS)]
    socket: str = ""  # with POSIX_FD: path, as the source sees it
    token: bytes = b""


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """Source to reader: it cannot be opened."""

    reason: str


_encode = msgspec.msgpack.Encoder().encode
_description = msgspec.msgpack.Decoder(Description)
_to_source = msgspec.msgpack.Decoder(Want)
_to_reader: msgspec.msgpack.Decoder[Offer | Declined] = msgspec.msgpack.Decoder(Offer | Declined)


def encode(message: Description | Want | Offer | Declined) -> bytes:
    return _encode(message)


def description(data: bytes) -> Description:
    """Raises HandshakeError."""
    try:
        return _description.decode(data)
    except msgspec.DecodeError as error:
        raise HandshakeError(f"the peer's description of its nvlink transport cannot be read: {error}") from error


def to_source(data: bytes) -> Want:
    """Raises TransferError."""
    try:
        return _to_source.decode(data)
    except msgspec.DecodeError as error:
        raise TransferError(FailureKind.TRANSFER, f"an nvlink message that makes no sense: {error}") from error


def to_reader(data: bytes) -> Offer | Declined:
    """Raises TransferError."""
    try:
        return _to_reader.decode(data)
    except msgspec.DecodeError as error:
        raise TransferError(FailureKind.TRANSFER, f"an nvlink message that makes no sense: {error}") from error


def check_same_machine(ours: Description, theirs: Description) -> None:
    """Raises TransferError (CONNECT) where a handle of ``theirs.kind`` cannot travel between the two."""
    if theirs.kind is not Kind.FABRIC and ours.boot_id and theirs.boot_id and ours.boot_id != theirs.boot_id:
        raise TransferError(
            FailureKind.CONNECT,
            "the source is not on this machine: nvlink reaches other machines with fabric memory only "
            "(MNNVL and an IMEX channel); nixl or ucx do",
        )
