"""An engine's ability to receive: it takes over prompts that another node computed. See
:class:`pd_serve.engine.role.Receiver`.

Runs on the engine's main thread; the pull itself is the inbox's, on the transfer thread. Blocks are
taken when the first of the prefill node's are ready, so that a queue there holds no memory here, and
go back only when the inbox says that no transfer can write them any more. Until there is room a sequence
keeps its lease and its place: the oldest request comes first, whatever the order in which prefill nodes
are done.
"""

from __future__ import annotations

import math
import time
from bisect import insort_right
from collections.abc import Iterator

from pd_serve.decode.inbox import Arrived, Drained, Failed, Inbox, Offered
from pd_serve.decode.ranks import RankedInbox
from pd_serve.engine.scheduler import Scheduler, by_age
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.manager import KVManager
from pd_serve.wire.link import Failure, Output, Peers, Source

STUCK_S = 2.0  # of a node that has no room but for what others are to read


class InboxReceiver:
    def __init__(
        self, kv: KVManager, scheduler: Scheduler, inbox: Inbox | RankedInbox, local_prefill_tokens: int
    ) -> None:
        self._kv = kv
        self._scheduler = scheduler
        self._inbox = inbox
        self._local_prefill_tokens = local_prefill_tokens
        self._expected: dict[str, Sequence] = {}  # until the inbox has ended them, aborted ones included
        self._offered: list[Sequence] = []  # their KV is ready; no blocks here yet. The oldest first
        self._stuck_since_s = math.inf
        self._placed = 0  # sequences with blocks whose KV is under way

    def fileno(self) -> int:
        return self._inbox.fileno()

    def submitted(self, seq: Sequence, source: Source) -> Output:
        missing = seq.num_tokens - self._kv.found(seq.tokens, seq.num_tokens - 1, seq.salt)
        if missing <= self._local_prefill_tokens and seq.sampling.prompt_logprobs < 0:
            return Output(id=seq.id, index=seq.output_index, tokens=[], event="local")
        seq.state = State.PULLING
        self._expected[seq.id] = seq
        self._inbox.expect(seq.id, source)
        return Output(id=seq.id, index=seq.output_index, tokens=[], event="accepted")

    def ended(self, seq: Sequence) -> None:
        if seq.state is State.PULLING:
            self._left(seq)
            self._inbox.cancel(seq.id)

    def events(self) -> Iterator[tuple[Sequence, Output]]:
        for event in self._inbox.events():
            seq = self._expected.get(event.key)
            if seq is None:
                continue
            match event:
                case Offered():
                    if seq.state is State.PULLING:
                        insort_right(self._offered, seq, key=by_age)
                case Arrived():
                    if (output := self._arrived(seq, event)) is not None:
                        yield seq, output
                case Failed():
                    if seq.state is State.PULLING:
                        self._left(seq)
                        failure = Failure("transfer", f"{event.kind}: {event.message}")
                        yield seq, Output(id=seq.id, index=seq.output_index, tokens=[], failure=failure)
                case Drained():
                    self._forget(seq)
                    self._scheduler.close_blocks(seq)
        self._place()

    def relent(self, leases: int) -> Iterator[tuple[Sequence, Output]]:
        """Gives up the oldest prompt that waits for room which this node's own ``leases`` take, when that has lasted.

        Two nodes that hold leases for each other could wait so for ever, each for the other to have room.
        """
        now_s = time.monotonic()
        if not (leases and self._offered) or self._placed or self._scheduler.running:
            self._stuck_since_s = math.inf
            return
        self._stuck_since_s = min(self._stuck_since_s, now_s)
        if now_s >= self._stuck_since_s + STUCK_S:
            self._stuck_since_s = math.inf
            seq = self._offered[0]
            self.ended(seq)
            failure = Failure("transfer", "prompts that others are to read took all of the room")
            yield seq, Output(id=seq.id, index=seq.output_index, tokens=[], failure=failure)

    def _left(self, seq: Sequence) -> None:
        """It is not wanted here any more, but the inbox has not ended it."""
        seq.state = State.FINISHED
        if seq in self._offered:
            self._offered.remove(seq)

    def _place(self) -> None:
        """Gives blocks to offered sequences and to nobody who is younger than the first that finds no room."""
        while self._offered and self._place_first(self._offered[0]):
            seq = self._offered.pop(0)
            seq.placed_s = time.monotonic()
            self._placed += 1
            self._scheduler.pace.placed(seq.placed_s)
        self._scheduler.outside_s = self._offered[0].arrival_s if self._offered else math.inf

    def _place_first(self, seq: Sequence) -> bool:
        scheduler = self._scheduler
        if scheduler.waiting and scheduler.waiting[0].arrival_s < seq.arrival_s:
            return False
        reserve = scheduler.num_placed + self._placed
        if reserve >= scheduler.limits.max_num_seqs:
            return False
        match = self._kv.match(seq.tokens, seq.num_tokens, seq.salt)
        blocks = self._kv.open(match)
        if not self._kv.can_extend(blocks, seq.num_tokens, reserve, live_only=True):
            self._kv.close(blocks)
            return False
        self._kv.extend(blocks, seq.num_tokens, live_only=True)
        seq.blocks = blocks
        seq.num_cached = min(match.num_tokens, seq.num_prompt)
        scheduler.prefix_queries += seq.num_tokens
        scheduler.prefix_hits += seq.num_cached
        cached = match.num_tokens // self._kv.layout.block_size
        groups = range(len(self._kv.layout.groups))
        first = [max(cached, self._kv.layout.first_live_block(g, seq.num_tokens)) for g in groups]
        self._inbox.accept(seq.id, [t[: blocks.num_blocks].copy() for t in blocks.tables], first)
        return True

    def _arrived(self, seq: Sequence, event: Arrived) -> Output | None:
        """The KV is here and its lease was valid to the end: the sequence may run."""
        self._forget(seq)
        if seq.state is not State.PULLING:  # aborted while the last message was on its way
            self._scheduler.close_blocks(seq)
            return None
        assert seq.blocks is not None
        seq.num_computed = seq.num_tokens
        self._kv.commit(seq.blocks, seq.tokens, seq.num_computed, event.whole_from)
        output = Output(id=seq.id, index=seq.output_index, tokens=[], event="arrived", num_cached=seq.num_cached)
        seq.append(event.first_token)
        self._scheduler.join(seq)
        return output

    def _forget(self, seq: Sequence) -> None:
        del self._expected[seq.id]
        if seq.blocks is not None:
            self._placed -= 1

    def peers(self, peers: Peers) -> None:
        for source in peers.sources:
            self._inbox.connect(source)

    @property
    def queued(self) -> int:
        return len(self._expected) - self._placed

    @property
    def pulling(self) -> int:
        return len(self._expected)

    def counters(self) -> dict[str, float]:
        return self._inbox.counters()

    def misfits(self) -> dict[str, str]:
        return self._inbox.misfits()

    def lanes(self) -> dict[str, float]:
        return self._inbox.lanes()

    def close(self) -> None:
        self._scheduler.outside_s = math.inf
        self._inbox.close()
