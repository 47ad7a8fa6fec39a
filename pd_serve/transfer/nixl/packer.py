"""The source's half of packed pulls: packs pieces that readers ask for into the slots of one staging ring.

A job waits for a slot, is packed by the mover, and keeps its slot until its reader gives it back or the reader's
session ends. A slot kept for longer than ``reclaim_s`` is taken back; the reader learns so from ``Freed(valid=False)``,
and its pull fails. Bounded: slots by the ring, jobs by the tickets a reader may have out.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pair, Send
from pd_serve.transfer.movers.base import I64, Mover, Work
from pd_serve.transfer.nixl import messages as m
from pd_serve.transfer.nixl.bindings import Agent
from pd_serve.transfer.nixl.limits import Limits
from pd_serve.transfer.nixl.staging import Ring, lay_out
from pd_serve.transfer.packing.copies import pack
from pd_serve.transfer.packing.pieces import decode
from pd_serve.transfer.poller import look_s

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    session: NixlReader
    ticket: int
    parts: list[tuple[int, I64]]
    slot: int = -1
    work: Work | None = None
    packed_at_s: float = 0.0
    wanted: bool = True  # False: its reader gave it back, or is gone, while it was being packed


@dataclass(eq=False)
class NixlReader:
    """One reader's session. See :class:`pd_serve.transfer.base.Reader`."""

    packer: Packer
    pair: Pair
    send: Send
    jobs: dict[int, Job] = field(default_factory=dict)  # by ticket
    closed: bool = False
    _outgoing: list[m.ToReader] = field(default_factory=list)

    def receive(self, message: bytes) -> None:
        """Raises TransferError for what makes no sense."""
        if self.closed:
            return
        self.packer.heard()
        for item in m.decode_to_source(message):
            if isinstance(item, m.Open):
                self.say(self.packer.open())
            elif isinstance(item, m.Pack):
                self.packer.add(self, item)
                self.packer.progress()  # the next are decoded while this one is packed
            else:
                self.packer.free(self, item.ticket)
        self.packer.progress()
        self.flush()

    def say(self, message: m.ToReader) -> None:
        self._outgoing.append(message)

    def flush(self) -> None:
        if self._outgoing and not self.closed:
            self.send(m.encode(self._outgoing))
        self._outgoing.clear()

    def close(self) -> None:
        self.closed = True
        for ticket in list(self.jobs):
            self.packer.drop(self, ticket)


class Packer:
    """``largest_block_bytes``: of the pool's groups."""

    def __init__(
        self,
        mover: Mover,
        agent: Agent,
        limits: Limits,
        largest_block_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._mover = mover
        self._look_s = look_s(mover.device)
        self._agent = agent
        self._limits = limits
        self._largest_block_bytes = largest_block_bytes
        self._clock = clock
        self.ring: Ring | None = None
        self._waiting: deque[Job] = deque()
        self._packing: list[Job] = []
        self._packed: dict[Job, None] = {}  # oldest first
        self._heard_s = -math.inf  # when a reader last said something

    def serve(self, pair: Pair, send: Send) -> NixlReader:
        return NixlReader(self, pair, send)

    def heard(self) -> None:
        self._heard_s = self._clock()

    def open(self) -> m.ToReader:
        try:
            if self.ring is None:
                self.ring = Ring(self._mover, self._agent, self._limits, self._largest_block_bytes)
        except TransferError as error:
            log.error("packed pulls are not possible: %s", error)
            return m.NotOpened(str(error))
        ring = self.ring
        tickets = self._limits.slots_per_peer
        return m.Opened(self._agent.metadata(), ring.address, ring.slot_bytes, ring.slots, tickets)

    def add(self, session: NixlReader, message: m.Pack) -> None:
        """Raises TransferError for what no reader may ask."""
        if self.ring is None:
            raise TransferError(FailureKind.TRANSFER, "a peer asks for packed pieces without having opened the ring")
        if message.ticket in session.jobs or len(session.jobs) >= self._limits.slots_per_peer:
            raise TransferError(
                FailureKind.TRANSFER,
                f"a peer asks for packed pieces under ticket {message.ticket}, which is taken or one too many",
            )
        parts = [(part.group, decode(part.pieces, part.group, session.pair)) for part in message.parts]
        _, size = lay_out(session.pair.slicings, parts)
        if not 0 < size <= self.ring.slot_bytes:
            raise TransferError(
                FailureKind.TRANSFER, f"a peer asks for {size} bytes in a slot of {self.ring.slot_bytes}"
            )
        job = session.jobs[message.ticket] = Job(session, message.ticket, parts)
        self._waiting.append(job)

    def free(self, session: NixlReader, ticket: int) -> None:
        """The reader's word; unknown tickets are those that were taken back."""
        session.say(m.Freed(ticket, self.drop(session, ticket)))

    def drop(self, session: NixlReader, ticket: int) -> bool:
        """Forgets a job, wherever it is; False if there is none."""
        job = session.jobs.pop(ticket, None)
        if job is None:
            return False
        job.wanted = False
        if job.slot < 0:
            self._waiting.remove(job)
        elif job.work is None:
            del self._packed[job]
            self._release(job)
        return True

    def _release(self, job: Job) -> None:
        assert self.ring is not None
        self.ring.give_back(job.slot)
        job.slot = -1

    def progress(self) -> float:
        """Moves all jobs on; returns in how many seconds it wants to be called again."""
        if self.ring is None:
            return math.inf
        now_s = self._clock()
        self._finish(now_s)
        self._reclaim(now_s)
        while self._waiting and self.ring.num_free:
            self._start(self._waiting.popleft())
            # the first slots are read while the others are still being packed
            until_s = time.perf_counter() + self._limits.patience_s
            self._finish(now_s)
            while self._packing and time.perf_counter() < until_s:
                self._finish(now_s)
        if self._packing or now_s < self._heard_s + self._limits.awake_s:
            return self._look_s
        oldest = next(iter(self._packed), None)
        return math.inf if oldest is None else max(0.0, oldest.packed_at_s + self._limits.reclaim_s - now_s)

    def _start(self, job: Job) -> None:
        assert self.ring is not None
        slot = self.ring.take()
        assert slot is not None
        job.slot = slot
        pair, at = job.session.pair, self.ring.at(slot)
        offsets, _ = lay_out(pair.slicings, job.parts)
        places = zip(job.parts, offsets, strict=True)
        items = [pack(pair, group, pieces, at + offset) for (group, pieces), offset in places]
        try:
            job.work = self._mover.copy(items)
        except TransferError as error:
            self._failed(job, error)
            return
        self._packing.append(job)

    def _finish(self, now_s: float) -> None:
        packing, self._packing = self._packing, []
        for job in packing:
            assert job.work is not None
            try:
                done = job.work.done()
            except TransferError as error:
                self._failed(job, error)
                continue
            if not done:
                self._packing.append(job)
                continue
            job.work = None
            if job.wanted:
                job.packed_at_s = now_s
                self._packed[job] = None
                job.session.say(m.Packed(job.ticket, job.slot))
                job.session.flush()
            else:
                self._release(job)

    def _failed(self, job: Job, error: TransferError) -> None:
        job.work = None
        self._release(job)
        if job.wanted:
            del job.session.jobs[job.ticket]
            job.session.say(m.NotPacked(job.ticket, str(error)))
            job.session.flush()

    def _reclaim(self, now_s: float) -> None:
        for job in list(self._packed):
            if now_s < job.packed_at_s + self._limits.reclaim_s:
                return
            log.warning("a reader has kept a staging slot for %g s: it is taken back", self._limits.reclaim_s)
            self.drop(job.session, job.ticket)
