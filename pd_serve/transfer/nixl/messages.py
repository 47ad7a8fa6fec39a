"""What the two ends of a pair say to each other: a description in the handshake, then the traffic of packed pulls.

The reader opens the source's staging ring once. For each *chunk* of a pull it sends ``Pack`` under a new ticket, is
answered ``Packed`` when the pieces lie in a slot, reads the slot, and sends ``Free``; ``Freed`` tells it whether the
slot was its own all the time. Several messages that are due together travel as one.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from pd_serve.errors import FailureKind, TransferError

Address = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Ticket = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Small = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]

T = TypeVar("T")


class Endpoint(msgspec.Struct):
    """What ``describe`` sends."""

    agent: str
    metadata: bytes  # NIXL's own
    device: Small | None  # of the pool: CUDA ordinal there; None: host memory
    # Where no process of this machine can read the pool directly, the machine's boot id; else empty.
    closed_on: Annotated[str, msgspec.Meta(max_length=64)] = ""


# --- reader to source


class Open(msgspec.Struct, tag="open"):
    """I am going to pull packed."""


class Part(msgspec.Struct, array_like=True):
    group: Small
    pieces: bytes  # see :mod:`pd_serve.transfer.packing.pieces`


class Pack(msgspec.Struct, tag="pack"):
    """Bring these pieces into a slot, laid out as :func:`pd_serve.transfer.nixl.staging.lay_out` says."""

    ticket: Ticket
    parts: list[Part]


class Free(msgspec.Struct, tag="free"):
    """I have read it, or do not want it any more."""

    ticket: Ticket


# --- source to reader


class Opened(msgspec.Struct, tag="opened"):
    """Where the ring is; ``metadata`` is the agent's, which by now covers it."""

    metadata: bytes
    address: Address
    slot_bytes: Annotated[int, msgspec.Meta(ge=1, lt=2**40)]
    slots: Annotated[int, msgspec.Meta(ge=1, lt=2**10)]
    tickets: Annotated[int, msgspec.Meta(ge=1, lt=2**10)]  # how many may be out at once


class NotOpened(msgspec.Struct, tag="not_opened"):
    reason: str


class Packed(msgspec.Struct, tag="packed"):
    ticket: Ticket
    slot: Small


class NotPacked(msgspec.Struct, tag="not_packed"):
    ticket: Ticket
    reason: str


class Freed(msgspec.Struct, tag="freed"):
    """``valid``: from ``Packed`` until now the slot held these pieces and nothing else."""

    ticket: Ticket
    valid: bool


ToSource = Open | Pack | Free
ToReader = Opened | NotOpened | Packed | NotPacked | Freed

encode = msgspec.msgpack.Encoder().encode
_to_source = msgspec.msgpack.Decoder(list[ToSource])
_to_reader = msgspec.msgpack.Decoder(list[ToReader])
_endpoint = msgspec.msgpack.Decoder(Endpoint)


def decode_to_source(frame: bytes) -> list[ToSource]:
    return _decode(_to_source, frame)


def decode_to_reader(frame: bytes) -> list[ToReader]:
    return _decode(_to_reader, frame)


def decode_endpoint(description: bytes) -> Endpoint:
    return _decode(_endpoint, description)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    try:
        return decoder.decode(frame)
    except msgspec.DecodeError as error:
        raise TransferError(
            FailureKind.TRANSFER, f"a message of the peer's NIXL lane cannot be read: {error}"
        ) from error
