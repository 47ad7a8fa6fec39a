"""Pulls and the copies they share: all pulls of one turn go to the device in one call, and end with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Outcome, PullState
from pd_serve.transfer.movers.base import I64, Rows, Work

if TYPE_CHECKING:
    from pd_serve.transfer.nvlink.peer import NvlinkPeer


class Batch:
    """One call of the mover."""

    def __init__(self, work: Work) -> None:
        self.work: Work | None = work
        self.error: TransferError | None = None

    def ended(self) -> bool:
        """No byte is read or written any more. Never blocks."""
        if self.work is not None:
            try:
                if self.work.done():
                    self.work = None
            except TransferError as error:
                self.error, self.work = error, None
        return self.work is None


@dataclass(frozen=True)
class Part:
    """Pieces of one group. ``source`` has addresses of the source's process, for its mapping may not be there yet."""

    group: int
    source: Rows
    target: Rows


class NvlinkPull(Outcome):
    """One transfer. See :class:`pd_serve.transfer.base.Pull`. ``flush``: starts what waits, this pull included."""

    def __init__(self, peer: NvlinkPeer, parts: list[Part], num_descriptors: int, flush: Callable[[], None]) -> None:
        self.size_bytes = sum(part.target.size_bytes for part in parts)
        self.num_descriptors = num_descriptors
        self.peer = peer
        self._parts = parts
        self._flush = flush
        self._batch: Batch | None = None
        if not parts:
            self.state = PullState.DONE

    @property
    def work(self) -> Work | None:
        return None if self._batch is None else self._batch.work

    @property
    def waiting(self) -> bool:
        return self._batch is None and self.state is PullState.RUNNING

    def items(self, bases: list[tuple[int, I64]]) -> list[tuple[Rows, Rows]]:
        """For the mover; ``bases``: where the source's regions are mapped here, and their places."""
        found = []
        for part in self._parts:
            base, places = bases[part.group]
            rows = part.source.rows if len(places) == 1 else places
            found.append((Rows(base, part.source.starts, rows, part.source.row_bytes), part.target))
        return found

    def start(self, batch: Batch) -> None:
        self._batch = batch
        self._parts = []

    def fail(self, error: TransferError) -> None:
        super().fail(error)
        self._parts = []

    def poll(self) -> PullState:
        if self.waiting:
            self._flush()
        if self.state is PullState.RUNNING and self._batch is not None and self._batch.ended():
            if self._batch.error is None:
                self.state = PullState.DONE
            else:
                self.fail(self._batch.error)
        return self.state

    def close(self) -> bool:
        if self.waiting:
            self.fail(TransferError(FailureKind.CANCELLED, "the pull was closed before it began"))
        return self._batch is None or self._batch.ended()
