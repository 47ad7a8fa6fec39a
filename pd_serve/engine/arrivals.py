"""KV on its way between the engine's pool and its host tier: what waits for it, and what becomes of it.

Used by the engine's loop and, when a sequence is admitted, by the scheduler. A prompt whose cached prefix goes on in
the host tier gets its blocks at once, waits outside the queue while they are filled, and runs from there on. What is
put by holds nothing up: copies to the tier hold no block, and where one is taken meanwhile the copy is dropped
(:mod:`pd_serve.kv.tiers`). Only what steps that have been collected wrote is stored: such a copy waits for nothing.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort_left
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from pd_serve.engine.plan import Work
from pd_serve.engine.rates import Rates
from pd_serve.engine.scheduler import Scheduler, by_age
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.tiered import TieredKVManager
from pd_serve.kv.tiers import Copy

_FADING = 0.99  # of the longest prompt lately, with each that follows


class Ended(Protocol):
    @property
    def ticket(self) -> int: ...

    @property
    def whole(self) -> bool: ...

    @property
    def seconds(self) -> float: ...


class Copies(Protocol):
    """What :class:`pd_serve.compute.copies.HostCopies` is, and :class:`pd_serve.engine.rank_copies.RankedCopies`."""

    num_slots: tuple[int, ...]  # of each group

    def fileno(self) -> int: ...

    def load(self, ticket: int, copies: list[Copy], /) -> None: ...

    def store(self, ticket: int, copies: list[Copy], /) -> None: ...

    def ended(self) -> Seq[Ended]: ...

    def drain(self) -> None: ...

    def discard(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Load:
    seq: Sequence
    copies: list[Copy]
    num_tokens: int  # of the sequence, when they have ended
    void: bool = False  # its content is not wanted any more


class Arrivals:
    """Owns ``copies``. ``kv`` is the scheduler's."""

    def __init__(self, kv: TieredKVManager, scheduler: Scheduler, copies: Copies) -> None:
        self._kv = kv
        self._scheduler = scheduler
        self._copies = copies
        self._tickets = itertools.count(1)
        self._loads: dict[int, _Load] = {}
        self._stores: dict[int, list[Copy]] = {}
        self._rates = Rates()
        self._counts: Counter[str] = Counter()
        self._took_s = {"load": 0.0, "store": 0.0, "thread": 0.0}
        # what two steps may take: the next one is planned while copies for this one are on their way
        self._horizon = 2 * kv.layout.blocks_for(scheduler.limits.max_num_batched_tokens)
        self._longest = 0.0  # blocks of the longest prompt lately: it takes them all at once
        scheduler.further = self

    def fileno(self) -> int:
        return self._copies.fileno()

    @property
    def loading(self) -> bool:
        """Whether blocks are being filled, be it for a sequence that has ended."""
        return bool(self._loads)

    # --- loads

    def fetch(self, seq: Sequence) -> bool:
        """Takes over a sequence that is being admitted with what the device has of it. False: there is no more of it in
        the host tier, or computing that is sooner done.
        """
        blocks = seq.blocks
        assert blocks is not None  # it has its prefix
        self._longest = max(self._longest * _FADING, self._kv.layout.blocks_for(seq.num_tokens))
        limit = 0 if seq.sampling.prompt_logprobs >= 0 else seq.num_tokens - 1
        reach = self._kv.reach(blocks, seq.tokens, limit)
        if not reach.path:
            return False
        more = reach.num_tokens - seq.num_computed
        if not self._rates.load_pays():
            self._counts["declined_tokens"] += more
            return False
        load = _Load(seq, self._kv.fetch(blocks, reach), reach.num_tokens)
        self._kv.extend(blocks, seq.num_tokens)
        seq.state = State.LOADING
        ticket = next(self._tickets)
        self._loads[ticket] = load
        self._copies.load(ticket, load.copies)
        return True

    def events(self) -> Iterator[Sequence]:
        """Books what has ended; yields the sequences that run from now on with the KV that has come."""
        for ended in self._copies.ended():
            stored = self._stores.pop(ended.ticket, None)
            if stored is not None:
                self._book("store", stored, ended)
                self._kv.tier.stored(stored, whole=ended.whole)
            else:
                load = self._loads.pop(ended.ticket)
                self._book("load", load.copies, ended)
                self._kv.tier.loaded(load.copies, whole=ended.whole)
                if self._arrived(load, ended):
                    yield load.seq

    def _book(self, way: str, copies: list[Copy], ended: Ended) -> None:
        self._took_s[way] += ended.seconds
        self._counts[f"{way}_bytes"] += sum(self._kv.layout.block_bytes(copy.group) for copy in copies)
        self._counts["failed_copies"] += not ended.whole

    def _arrived(self, load: _Load, ended: Ended) -> bool:
        scheduler, seq = self._scheduler, load.seq
        scheduler.loading.remove(seq)
        if seq.state is State.FINISHED or load.void or not ended.whole:
            scheduler.close_blocks(seq)
            if seq.state is not State.FINISHED:
                seq.num_computed = 0
                seq.state = State.WAITING
                insort_left(scheduler.waiting, seq, key=by_age)
            return False
        assert seq.blocks is not None
        self._rates.load.add(load.num_tokens - seq.num_computed, ended.seconds)
        if seq.output_index == 0:
            self._counts["hit_tokens"] += min(load.num_tokens, seq.num_prompt) - seq.num_cached
        seq.num_computed = load.num_tokens
        seq.num_cached = min(load.num_tokens, seq.num_prompt)
        self._kv.commit(seq.blocks, seq.tokens, seq.num_computed)
        scheduler.join(seq)
        return True

    def computed(self, works: Seq[Work]) -> None:
        """A step has been collected: how long prompts that end in it took."""
        for work in works:
            seq = work.seq
            if work.samples and work.num_tokens > 1 and work.end == seq.num_prompt:
                self._rates.compute.add(work.end - seq.num_cached, time.monotonic() - seq.started_s)

    # --- stores

    def store(self) -> None:
        """Begins what is due. Called every turn, after what has ended was booked and before blocks are taken."""
        began_s = time.monotonic()
        copies = self._kv.tier.stores(self._kv.pools, self._horizon + int(self._longest))
        if copies:
            ticket = next(self._tickets)
            self._stores[ticket] = copies
            self._copies.store(ticket, copies)
        self._took_s["thread"] += time.monotonic() - began_s

    # --- ends

    def forget(self) -> None:
        """Nothing that is stored, or on its way, is found any more; sequences that wait for it are admitted anew."""
        self._kv.tier.forget()
        for load in self._loads.values():
            load.void = True

    def sleep(self, level: int) -> None:
        """Before the pool's memory goes; nothing runs. What is stored outlives level 1, as the weights do."""
        self._copies.drain()
        for _ in self.events():
            raise AssertionError("a sequence was left when the engine fell asleep")
        if level == 2:
            self._kv.tier.forget()
            self._copies.discard()

    def counters(self) -> dict[str, float]:
        tier = self._kv.tier.counts
        names = ("hit_tokens", "declined_tokens", "load_bytes", "store_bytes", "failed_copies")
        return {
            **{f"host_kv_{name}": float(self._counts[name]) for name in names},
            **{f"host_kv_{name}_seconds": value for name, value in self._took_s.items()},
            "host_kv_stored_blocks": tier.stored,
            "host_kv_loaded_blocks": tier.loaded,
            "host_kv_spoiled_blocks": tier.spoiled,
            "host_kv_evicted_blocks": tier.evicted,
        }

    def close(self) -> None:
        self._copies.close()
