"""A queue between two threads whose reader sleeps in a poller: every put makes a file descriptor readable."""

from __future__ import annotations

import os
import queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any thread puts, one thread takes. After ``close`` puts are ignored."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    def fileno(self) -> int:
        """Readable while something may be waiting."""
        return self._fd

    def put(self, item: T) -> None:
        if not self._closed:
            self._items.put(item)
            self.wake()

    def wake(self) -> None:
        """Makes it readable with nothing in it."""
        if not self._closed:
            os.eventfd_write(self._fd, 1)

    def take(self) -> list[T]:
        """Everything that waits, in order; does not block."""
        try:
            os.eventfd_read(self._fd)  # first, so that a put from now on wakes the reader again
        except BlockingIOError:
            pass
        items = []
        while True:
            try:
                items.append(self._items.get_nowait())
            except queue.Empty:
                return items

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._fd)
