"""What an engine's rank 0 tells its other ranks, in order: steps, copies, orders, and what transfer ends are asked.

A line is a Unix socket with lengths before payloads. Steps, copies and transfer calls have no answer here, so that
nothing waits; an order has one. Its end closes with a process, and the other end hears it.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

import msgspec

_HEAD = struct.Struct("<IB")


class Kind(IntEnum):
    STEP = 1  # of :func:`pd_serve.compute.step.encode`
    TRANSFER = 2  # of :class:`pd_serve.transfer.relay.Relays`
    ORDER = 3
    ANSWER = 4
    COPIES = 5  # to and from the host tier


class Sleep(msgspec.Struct, frozen=True, tag=True):
    level: int


class Wake(msgspec.Struct, frozen=True, tag=True):
    tags: list[str]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The rank ends."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """``copies``: group, block and slot of each (:class:`pd_serve.kv.tiers.Copy`)."""

    ticket: int
    copies: list[tuple[int, int, int]]


class Store(msgspec.Struct, frozen=True, tag=True):
    """As :class:`Load`, the other way."""

    ticket: int
    copies: list[tuple[int, int, int]]


class Discard(msgspec.Struct, frozen=True, tag=True):
    """Nothing that the host tier has is wanted any more, and nothing is on its way."""


class Answer(msgspec.Struct, frozen=True):
    """Of a start or an order. ``error``: why it failed; ``mendable``: by a user, who is told so."""

    error: str = ""
    mendable: bool = False


class LineClosed(ConnectionError):
    """The other process has ended."""


decode_order = msgspec.msgpack.Decoder(Sleep | Wake | Stop).decode
decode_copies = msgspec.msgpack.Decoder(Load | Store | Discard).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
encode = msgspec.msgpack.Encoder().encode


class Line:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, kind: Kind, payload: bytes) -> None:
        """Raises LineClosed."""
        try:
            self._sock.sendall(_HEAD.pack(len(payload), kind) + payload)
        except OSError as error:
            raise LineClosed(str(error)) from None

    def receive(self, timeout_s: float | None = None) -> tuple[Kind, bytes]:
        """The next message. Raises LineClosed, TimeoutError."""
        self._sock.settimeout(timeout_s)
        try:
            size, kind = _HEAD.unpack(self._exactly(_HEAD.size))
            return Kind(kind), self._exactly(size)
        except TimeoutError:
            raise
        except OSError as error:
            raise LineClosed(str(error)) from None
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(None)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._sock.recv_into(view)
            if not count:
                raise LineClosed("the other process has ended")
            view = view[count:]
        return bytes(data)

    def close(self) -> None:
        self._sock.close()
