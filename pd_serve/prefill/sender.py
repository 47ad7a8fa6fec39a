"""An engine's ability to send: it announces the blocks of prompts that others will decode, chunk by chunk, and leases
them. See :class:`pd_serve.engine.role.Sender`.

Runs on the engine's main thread. The lease itself (clock, heartbeats, release) is the outbox's, on the
transfer thread; this side only holds the blocks until it hears that the lease has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

from pd_serve.engine.scheduler import Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.manager import KVManager, SequenceBlocks
from pd_serve.prefill.outbox import LeaseEnded, Outbox
from pd_serve.prefill.ranks import RankedOutbox
from pd_serve.wire.link import Failure, Output
from pd_serve.wire.peer import Blocks


class OutboxSender:
    def __init__(self, kv: KVManager, scheduler: Scheduler, outbox: Outbox | RankedOutbox) -> None:
        self._kv = kv
        self._scheduler = scheduler
        self._outbox = outbox
        self._open: dict[str, tuple[Sequence, list[int]]] = {}  # being computed; blocks announced so far, a group
        self._leased: dict[str, tuple[int, SequenceBlocks]] = {}  # router and blocks

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        return self._outbox.listen(timeout_s)

    def fileno(self) -> int:
        return self._outbox.fileno()

    def submitted(self, seq: Sequence) -> None:
        layout = self._kv.layout
        # the decode node needs only what later tokens can see
        first = [layout.first_live_block(group, seq.num_tokens) for group in range(len(layout.groups))]
        self._open[seq.id] = (seq, first)
        self._outbox.open(seq.id)

    def computed(self, seq: Sequence, token: int | None) -> None:
        self._publish(seq, token)
        if token is not None:
            assert seq.blocks is not None
            del self._open[seq.id]
            self._leased[seq.id] = seq.origin, seq.blocks
            seq.blocks = None
            self._scheduler.detach(seq)

    def _publish(self, seq: Sequence, token: int | None) -> None:
        """Announces the blocks filled since the last time; with ``token``, also the last, partial one."""
        blocks, announced = seq.blocks, self._open[seq.id][1]
        assert blocks is not None
        size = self._kv.layout.block_size
        upto = blocks.num_blocks if token is not None else seq.num_computed // size
        items = []
        for group, first in enumerate(announced):
            if upto > first:
                items.append(Blocks(group, first, blocks.tables[group][first:upto].astype("<i4").tobytes()))
                announced[group] = upto
        if items or token is not None:
            self._outbox.publish(seq.id, seq.num_computed, items, token)

    def ended(self, seq: Sequence, reason: str) -> None:
        if self._open.pop(seq.id, None) is not None:
            self._outbox.cancel(seq.id, reason)

    def events(self) -> Iterator[tuple[Sequence, Output]]:
        for event in self._outbox.events():
            yield from self._lease_ended(event)

    def _lease_ended(self, event: LeaseEnded) -> Iterator[tuple[Sequence, Output]]:
        leased = self._leased.pop(event.key, None)
        if leased is not None:
            self._kv.close(leased[1])
            return
        entry = self._open.pop(event.key, None)
        if entry is not None:  # the decode node left before the prompt was computed
            seq = entry[0]
            if seq.state is not State.FINISHED:
                self._scheduler.remove(seq)
            failure = Failure("transfer", f"the decode node gave the request up ({event.why})")
            yield seq, Output(id=seq.id, index=seq.output_index, tokens=[], failure=failure)

    def abandoned(self, key: str) -> None:
        leased = self._leased.pop(key, None)
        if leased is not None:
            # a decode node that is reading right now finds its release answered "not valid"
            self._outbox.cancel(key, "aborted")
            self._kv.close(leased[1])

    def dropped(self, origin: int) -> None:
        for key in [key for key, (router, _) in self._leased.items() if router == origin]:
            self.abandoned(key)

    @property
    def leases(self) -> int:
        return len(self._leased)

    def counters(self) -> dict[str, float]:
        return self._outbox.counters()

    def close(self) -> None:
        self._outbox.close()
