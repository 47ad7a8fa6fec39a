"""Reads under way, and the remote agents they read from. Used by :mod:`peer` and :mod:`unpacker`.

A read is never released while it runs; see the package's docstring for why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Outcome, PullState
from pd_serve.transfer.nixl.bindings import I32, Agent

log = logging.getLogger(__name__)

# An endpoint that failed is torn down by the progress thread, a moment after the error is reported.
QUARANTINE_S = 0.1


class Read(Outcome):
    """One request of NIXL, ``state`` as of the last ``poll``. Its local memory is its own until ``close`` is True."""

    def __init__(self, agent: Agent, handle: int) -> None:
        self._agent = agent
        self._handle: int | None = handle
        self._failed_at_s = 0.0
        self._ask(agent.post)

    def poll(self) -> PullState:
        if self.state is PullState.RUNNING:
            self._ask(self._agent.status)
        return self.state

    def _ask(self, call: Callable[[int], Any]) -> None:
        nixl = self._agent.nixl
        assert self._handle is not None
        try:
            status = call(self._handle)
        except nixl.nixlRemoteDisconnectError:
            self._fail(FailureKind.PEER_LOST, "the prefill node's endpoint is gone (NIXL: remote disconnect)")
        except self._agent.errors as error:
            self._fail(FailureKind.TRANSFER, f"NIXL could not read: {error}")
        else:
            if status == nixl.NIXL_SUCCESS:
                self.state = PullState.DONE
            elif status != nixl.NIXL_IN_PROG:
                self._fail(FailureKind.TRANSFER, f"NIXL could not read: status {status}")

    def _fail(self, kind: FailureKind, message: str) -> None:
        self.fail(TransferError(kind, message))
        self._failed_at_s = time.monotonic()

    def close(self) -> bool:
        if self._handle is None:
            return True
        state = self.poll()
        if state is PullState.RUNNING:
            return False
        if state is PullState.FAILED and time.monotonic() < self._failed_at_s + QUARANTINE_S:
            return False
        self._agent.release_read(self._handle)
        self._handle = None
        return True


class Remote:
    """An agent whose metadata is loaded, shared by the peers (sessions) that read from it.

    ``broken``: a read from it has failed, so that others can only fail too.
    """

    def __init__(self, agent: Agent, name: str, metadata: bytes) -> None:
        self.name = name
        self.users = 0
        self.broken = False
        self._agent = agent
        self._loaded = b""
        self._running: list[Read] = []
        self._left: list[tuple[Read, Callable[[], None]]] = []
        self.load(metadata)

    def load(self, metadata: bytes) -> None:
        """Learns of memory that the remote has registered since. Raises TransferError."""
        if metadata != self._loaded:
            self._agent.load(self.name, metadata)
            self._loaded = metadata

    def read(self, local: int, local_ids: I32, remote: int, remote_ids: I32) -> Read:
        """Starts reading. Raises TransferError."""
        if self.broken:
            raise TransferError(FailureKind.PEER_LOST, "the prefill node's endpoint has failed")
        try:
            handle = self._agent.make_read(local, local_ids, remote, remote_ids)
        except self._agent.errors as error:
            self.broken = True
            raise TransferError(FailureKind.PEER_LOST, f"NIXL cannot read from {self.name}: {error}") from error
        read = Read(self._agent, handle)
        self._running.append(read)
        return read

    def leave(self, read: Read, then: Callable[[], None]) -> None:
        """Nobody waits for this read any more; ``then`` is called when it writes no more."""
        self._left.append((read, then))

    def settle(self) -> bool:
        """Asks after every read, and drops those that have ended; True when none is left."""
        for read in self._running:
            read.poll()
        return self.drop_ended()

    def drop_ended(self) -> bool:
        """The same, of reads that somebody waits for, without asking: who waits has asked."""
        self.broken |= any(read.state is PullState.FAILED for read in self._running)
        self._running = [read for read in self._running if read.state is PullState.RUNNING]
        if self._left:
            waiting, self._left = self._left, []
            for read, then in waiting:
                if read.close():
                    then()
                else:
                    self._left.append((read, then))
        return not self._running and not self._left

    def forget(self) -> None:
        if not self._agent.forget(self.name):
            log.debug("NIXL had already dropped %s", self.name)
