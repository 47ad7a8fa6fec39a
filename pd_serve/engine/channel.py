"""The engine's end of the socket to its node process (see :mod:`pd_serve.wire.engine`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import zmq

from pd_serve.wire import engine as wire
from pd_serve.wire import link


class Channel:
    """A ZeroMQ DEALER socket; frames: origin, payload. Never blocks on sending."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the node, which drops slow links
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(address)

    def send_node(self, message: wire.FromEngine) -> None:
        self.socket.send_multipart([wire.NODE, wire.encoder.encode(message)])

    def send_router(self, origin: int, message: link.Outputs | link.Prefixes) -> None:
        self.socket.send_multipart([origin.to_bytes(4, "little"), link.encoder.encode(message)])

    def receive(self) -> Iterator[tuple[int, bytes]]:
        """All messages that have arrived, as ``(origin, payload)``."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield int.from_bytes(frames[0], "little"), frames[1]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
