"""What the two ends of a session tell each other, in MessagePack, over the authenticated peer channel."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Annotated

import msgspec

from pd_serve.errors import FailureKind, HandshakeError, TransferError

VERSION = 1
HELLO = 0  # the source's first message, of HELLO_BYTES: UCX has found its way
HELLO_BYTES = 8

Number = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Description(msgspec.Struct):
    """``Transport.describe``."""

    version: int
    address: Annotated[bytes, msgspec.Meta(min_length=16)]  # of the UCX worker
    crc: int  # of the address: UCX trusts it blindly
    message_bytes: Count  # a message is at most this long, or one piece
    window: Count  # messages that may be asked for and not yet sent
    machine: Annotated[str, msgspec.Meta(max_length=64)] = ""  # its boot id


class Open(msgspec.Struct, tag="open"):
    """Reader to source, first: connect to me and say hello. ``session`` is the upper half of all tags."""

    session: Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


class Want(msgspec.Struct, array_like=True):
    """Pieces of one group, to be sent as one message with the tag ``session << 32 | number``."""

    number: Number
    group: Annotated[int, msgspec.Meta(ge=0)]
    pieces: bytes  # see :mod:`pd_serve.transfer.packing.pieces`


class Wants(msgspec.Struct, tag="wants"):
    """Reader to source. The receives are posted, so nothing arrives unasked."""

    wants: list[Want]


class Gone(msgspec.Struct, tag="gone"):
    """Source to reader: nothing more will be sent in this session."""

    reason: str


encode = msgspec.msgpack.Encoder().encode
_from_reader: Callable[[bytes], Open | Wants] = msgspec.msgpack.Decoder(Open | Wants).decode
_from_source = msgspec.msgpack.Decoder(Gone).decode
_description = msgspec.msgpack.Decoder(Description).decode


def from_reader(message: bytes) -> Open | Wants:
    """Raises TransferError."""
    try:
        return _from_reader(message)
    except msgspec.DecodeError as error:
        raise TransferError(FailureKind.TRANSFER, f"the reader's UCX message cannot be read: {error}") from error


def from_source(message: bytes) -> Gone:
    """Raises TransferError."""
    try:
        return _from_source(message)
    except msgspec.DecodeError as error:
        raise TransferError(FailureKind.TRANSFER, f"the source's UCX message cannot be read: {error}") from error


def description(message: bytes) -> Description:
    """Raises HandshakeError."""
    try:
        found = _description(message)
    except msgspec.DecodeError as error:
        raise HandshakeError(f"the peer's UCX description cannot be read: {error}") from error
    if found.version != VERSION:
        raise HandshakeError(f"the peer's UCX lane has version {found.version}, this one {VERSION}; upgrade the older")
    if found.crc != zlib.crc32(found.address):
        raise HandshakeError("the peer's UCX address is damaged")
    return found
