"""A connection of the peer channel's kind between the processes of a benchmark, with a timer beside it."""

from __future__ import annotations

import select
from collections import deque

from pd_serve.transfer.connection import Connection, dial, resolve
from pd_serve.transfer.timer import Timer


class Link:
    """Frames in order. ``ended``: why there will be no more; empty while there may."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._timer = Timer()
        self._poller = select.epoll()
        self._poller.register(self._timer.fileno(), select.EPOLLIN)
        self._poller.register(connection.fileno(), connection.interest)
        self._frames: deque[bytes] = deque()
        connection.changed = lambda: self._poller.modify(connection.fileno(), connection.interest)

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
            if delay_s > 0:
                self._timer.arm(delay_s)
                self._poller.poll()
                self._timer.clear()
            self._frames += self._connection.advance()
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        self._connection.close()
        self._poller.close()
        self._timer.close()
