"""What a router or an engine and its grammar process say to each other: frames over a pair of Unix sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import msgspec

from pd_serve.wire.link import Grammar

_HEAD = struct.Struct("<I")
_READ_BYTES = 1 << 18


class Load(msgspec.Struct, tag=True, array_like=True):
    """A model's tokenizer. No answer."""

    model: str  # what others call it by
    vocab_size: int  # of the model's logits
    eos: list[int]  # which end the output where the grammar is complete
    tokenizer_json: bytes = b""
    path: str = ""  # or where it lies


class Check(msgspec.Struct, tag=True, array_like=True):
    """Whether a grammar can be compiled in reasonable time. Answered by Checked, one after the other."""

    model: str
    grammar: Grammar


class Checked(msgspec.Struct, tag=True, array_like=True):
    lowered: str
    error: str = ""


class Open(msgspec.Struct, tag=True, array_like=True):
    """A sequence that the grammar is for, whose constrained output so far is ``tokens``. Answered by Permitted.

    ``jumps``: tokens beside which nothing is permitted are told of at once, and what may come after them.
    """

    id: int
    model: str
    grammar: Grammar
    tokens: list[int]
    jumps: bool = False


class Tell(msgspec.Struct, tag=True, array_like=True):
    """Output that came since. Answered by Permitted. Not before the answer to what was said before."""

    id: int
    tokens: list[int]
    jumps: bool = False


class Close(msgspec.Struct, tag=True, array_like=True):
    """The sequence has ended. Answers to what was asked before may still come."""

    id: int


class Permitted(msgspec.Struct, tag=True, array_like=True):
    """What may come next; after ``forced``, where that is not empty, for which there is no choice."""

    id: int
    mask: bytes  # a bit a token, little-endian words of 32
    stopped: bool = False  # the grammar is complete and nothing but an end may come
    error: str = ""  # why the sequence cannot go on
    forced: list[int] = []


ToWorker = Load | Check | Open | Tell | Close
FromWorker = Checked | Permitted

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def framed(message: ToWorker | FromWorker) -> bytes:
    payload = encode(message)
    return _HEAD.pack(len(payload)) + payload


class Unframed:
    """Takes bytes as they come, and gives whole payloads."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def payloads(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            end = _HEAD.size + _HEAD.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEAD.size : end])
            del self._buffer[:end]
            yield payload


def read(sock: socket.socket) -> bytes:
    """What there is; empty where the other end is gone. Raises BlockingIOError."""
    try:
        return sock.recv(_READ_BYTES)
    except ConnectionError:
        return b""
