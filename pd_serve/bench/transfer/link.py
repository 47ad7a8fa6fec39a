"""A connection of the peer channel's kind between the processes of a benchmark, as a transfer thread has them."""

from __future__ import annotations

from collections import deque

from pd_serve.transfer.poller import Poller
from pd_serve.transfer.session.connection import Connection, dial, resolve


class Link:
    """Frames in order. ``ended``: why there will be no more; empty while there may. ``poller``: what it waits with."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.poller = Poller()
        self.poller.register(connection.fileno(), connection.interest)
        self._frames: deque[bytes] = deque()
        connection.changed = lambda: self.poller.modify(connection.fileno(), connection.interest)

    @classmethod
    def dial(cls, address: str) -> Link:
        """Raises OSError."""
        return cls(dial(resolve(address)))

    @property
    def ended(self) -> str:
        return "" if self._frames else self._connection.ended

    def send(self, frame: bytes) -> None:
        self._connection.send(frame)

    def take(self, delay_s: float = 0.0) -> bytes | None:
        """The next frame, if one is there within ``delay_s``."""
        if not self._frames and not self._connection.ended:
            self.poller.wait(delay_s)
            self._frames += self._connection.advance()
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        self._connection.close()
        self.poller.close()
