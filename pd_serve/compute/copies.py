"""Copies of KV blocks between an engine's pool and its host tier: on their way while the engine goes on.

Two threads, one a direction, so that what a request waits for never waits for what is only put by. The engine's main
thread says which copies, and is woken when they have ended; it orders them: what is stored has been computed, and
nothing that is loaded is read or written before its copies have ended. How bytes move is the device's
(:class:`Mover`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from pd_serve.errors import PDServeError
from pd_serve.kv.tiers import Copy

log = logging.getLogger(__name__)

_JOIN_S = 5.0
DRAIN_S = 120.0  # all that can be on its way takes seconds, to a slow disk a minute


class Mover(Protocol):
    """Each verb is called by one thread of its own, and returns when the bytes are there. It raises what it likes."""

    num_slots: tuple[int, ...]  # of the host tier, in each group, slot 0 included

    def load(self, copies: list[Copy]) -> None:
        """From host to device."""

    def store(self, copies: list[Copy]) -> None:
        """From device to host."""

    def discard(self) -> None:
        """Nothing that is stored is wanted any more, and nothing is on its way."""

    def close(self) -> None:
        """Nothing is on its way."""


class Ended(NamedTuple):
    """``whole``: the bytes are there."""

    ticket: int
    whole: bool
    seconds: float  # since the copies were asked for


def does_not_end() -> PDServeError:
    return PDServeError(
        f"a copy between KV cache and host tier has not ended within {DRAIN_S:g} s, so that memory cannot be given "
        "back: try again later, or restart the node"
    )


class HostCopies:
    """Owns ``mover``. ``tell``: is called by the copying threads with what has ended; None: :meth:`ended` has it."""

    def __init__(self, mover: Mover, tell: Callable[[Ended], None] | None = None) -> None:
        self.num_slots = mover.num_slots
        self._mover = mover
        self._ended: deque[Ended] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loads = _Lane("pd-kv-load", mover.load, tell or self._tell)
        self._stores = _Lane("pd-kv-store", mover.store, tell or self._tell)

    def fileno(self) -> int:
        """Readable when copies have ended."""
        return self._event

    def load(self, ticket: int, copies: list[Copy]) -> None:
        self._loads.add(ticket, copies)

    def store(self, ticket: int, copies: list[Copy]) -> None:
        self._stores.add(ticket, copies)

    def ended(self) -> list[Ended]:
        """What has ended since the last call; of one direction in order."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    def drain(self) -> None:
        """Waits until nothing is on its way. What has ended is told as ever. Raises PDServeError where a copy hangs."""
        deadline_s = time.monotonic() + DRAIN_S
        if not (self._loads.drain(deadline_s) and self._stores.drain(deadline_s)):
            raise does_not_end()

    def discard(self) -> None:
        self.drain()
        self._mover.discard()

    def _tell(self, ended: Ended) -> None:
        self._ended.append(ended)
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """What waits is not copied any more."""
        if self._event < 0:
            return
        done = [lane.close() for lane in (self._loads, self._stores)]
        if all(done):
            self._mover.close()
            os.close(self._event)
        self._event = -1


class _Lane:
    def __init__(self, name: str, copy: Callable[[list[Copy]], None], tell: Callable[[Ended], None]) -> None:
        self._copy = copy
        self._tell = tell
        self._waiting: deque[tuple[int, list[Copy], float]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, ticket: int, copies: list[Copy]) -> None:
        with self._changed:
            self._waiting.append((ticket, copies, time.monotonic()))
            self._changed.notify_all()

    def drain(self, deadline_s: float) -> bool:
        with self._changed:
            left_s = max(0.0, deadline_s - time.monotonic())
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), left_s)

    def close(self) -> bool:
        """False: a copy hangs, and what it uses must stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_JOIN_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                ticket, copies, asked_s = self._waiting.popleft()
                self._busy = True
            whole = True
            try:
                self._copy(copies)
            except Exception:
                log.exception("%d KV blocks could not be copied", len(copies))
                whole = False
            self._tell(Ended(ticket, whole, time.monotonic() - asked_s))
