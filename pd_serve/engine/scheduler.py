"""Which sequences compute what in the next step.

One queue, one running list, continuous batching (Orca, OSDI'22) with chunked prefill (Sarathi-Serve,
OSDI'24) under a token budget. Admission is by blocks: a sequence starts when its whole prompt has room. The oldest
request comes first, by its age at the router and not in the queue, and nobody overtakes it for being small. When a
running sequence finds no block to grow into, the youngest gives its blocks back and is computed again later (recompute
preemption, vLLM, SOSP'23); the client sees a pause.

Called by the engine's main thread only. Never touches tensors.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort_left, insort_right
from dataclasses import dataclass
from typing import Protocol

from pd_serve.engine.pace import Pace
from pd_serve.engine.plan import Work
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.manager import KVManager
from pd_serve.kv.prefix import PrefixNode, block_keys
from pd_serve.wire.counted import QUEUE, no_times, observe
from pd_serve.wire.link import Failure

# Logits of prompt rows are wanted in float32 over the whole vocabulary: few rows at a time.
PROMPT_LOGPROBS_CHUNK = 64


@dataclass(frozen=True)
class Limits:
    max_num_seqs: int
    max_num_batched_tokens: int
    saturating_tokens: int  # tokens in a step from which on more of them cost in proportion
    max_queue: int
    max_queue_wait_s: float
    max_model_len: int


class Further(Protocol):
    """What has more of a prompt than the device: :class:`pd_serve.engine.arrivals.Arrivals`."""

    def fetch(self, seq: Sequence, /) -> bool:
        """Takes over a sequence whose cached prefix is open, or leaves it to be computed from there on."""


# A sequence decodes, with tokens that its grammar forced, as long as it has no more than so many to compute.
MAX_DECODE_TOKENS = 33

# Beside so many decodes that they saturate the device, prompts get this part of what does: they may not stand still.
_LEAST_CHUNKS = 4

# What a refused client is told to wait at least and at most.
RETRY_S = (1.0, 60.0)


def by_age(seq: Sequence) -> float:
    """Sorts queues: the oldest request first."""
    return seq.arrival_s


class Scheduler:
    def __init__(self, kv: KVManager, limits: Limits) -> None:
        self.kv = kv
        self.limits = limits
        self.waiting: list[Sequence] = []  # the oldest first
        # Arrival of the oldest sequence that waits for room but not in this queue: younger ones here come after it.
        self.outside_s = math.inf
        self.pace = Pace(time.monotonic())
        self.running: list[Sequence] = []
        self.further: Further | None = None
        self.loading: list[Sequence] = []  # what it has taken over; also those that ended since, while they hold blocks
        self.num_preemptions = 0
        self.num_started = 0
        self.times = no_times(QUEUE)  # between admission and start, of all that started
        self.prefix_queries = 0  # prompt tokens looked up in the prefix cache
        self.prefix_hits = 0  # of these, found

    # --- in and out ---------------------------------------------------------------------------------

    def refuses(self, queued: int, *, begun: bool = False) -> Failure | None:
        """Why one more request is not admitted now that ``queued`` wait for blocks.

        ``begun``: its client has part of the answer; it is older than most that wait, and comes before them.
        """
        if begun:
            return None
        wait_s = self.wait_s(queued)
        if queued >= self.limits.max_queue:
            why = f"the queue of this node is full ({self.limits.max_queue} requests)"
        elif wait_s > self.limits.max_queue_wait_s:
            why = f"a request would wait {wait_s:.0f} s in the queue of this node ({queued} are before it)"
        else:
            return None
        low, high = RETRY_S
        return Failure("refused", why, retry_after_s=min(max(wait_s, low), high))

    def wait_s(self, queued: int) -> float:
        """How long a request that comes now waits for blocks, by what was seen lately; 0 where nothing was."""
        return self.pace.wait_s(queued, time.monotonic())

    def add(self, seq: Sequence) -> None:
        """Queues a sequence that is to be computed here."""
        seq.state = State.WAITING
        insort_right(self.waiting, seq, key=by_age)

    def join(self, seq: Sequence) -> None:
        """Lets a sequence run that has its blocks: computed from here on, or with KV that has arrived."""
        if not seq.started:
            seq.started = True
            seq.started_s = time.monotonic()
            observe(self.times, QUEUE, seq.started_s - seq.admitted_s)
            self.num_started += 1
        seq.state = State.RUNNING
        seq.num_scheduled = seq.num_computed
        self.running.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Ends a waiting or running sequence and gives its blocks back, if need be when its last step is collected."""
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        elif seq.state is State.RUNNING:
            self.running.remove(seq)
        loading, seq.state = seq.state is State.LOADING, State.FINISHED
        if not (seq.in_flight or loading):
            self.close_blocks(seq)

    def detach(self, seq: Sequence) -> None:
        """Ends a running sequence whose blocks somebody else takes over."""
        self.running.remove(seq)
        seq.state = State.FINISHED

    def close_blocks(self, seq: Sequence) -> None:
        if seq.blocks is not None:
            self.kv.close(seq.blocks)
            seq.blocks = None

    # --- a step -------------------------------------------------------------------------------------

    def limit(self, seq: Sequence) -> int:
        """The length at which a sequence ends, if nothing ends it before."""
        return min(seq.num_prompt + seq.sampling.max_tokens, self.limits.max_model_len)

    def plan(self, *, launched: bool = False) -> list[Work] | None:
        """The next step's work, rows of one token first; empty when nothing can be done.

        ``launched``: a step is in flight. None: it has to be collected first, as its sequences' blocks are wanted.
        """
        works = self._plan_decodes(launched)
        if works is None:
            return None
        budget, over = self._prompt_budget(sum(work.num_tokens for work in works))
        for seq in [s for s in self.running if _is_prompt(s, s.num_scheduled) and not _is_forced(s)]:
            budget = self._plan_prefill(works, seq, budget, over)
        if self.waiting and budget > 0:
            self._admit(works, budget, over)
        self.pace.blocked(bool(self.waiting) or self.outside_s < math.inf, time.monotonic())
        works.sort(key=lambda w: w.num_tokens != 1)
        for work in works:
            work.seq.num_scheduled = work.end
        return works

    def _prompt_budget(self, decodes: int) -> tuple[int, int]:
        """How many tokens of prompts come into a step with so many others, and how many more where they end a prompt.

        What decodes waits for the whole step: beside it, chunks fill the step up to where it pays, and yet go on.
        """
        most = self.limits.max_num_batched_tokens - decodes
        if not decodes:
            return most, 0
        least = -(-self.limits.saturating_tokens // _LEAST_CHUNKS)
        budget = min(most, max(self.limits.saturating_tokens - decodes, least))
        return budget, min(least, most - budget)

    def _plan_decodes(self, launched: bool) -> list[Work] | None:
        works: list[Work] = []
        spare = self.limits.max_num_batched_tokens - len(self.running)  # for forced tokens
        for seq in sorted(self.running, key=by_age):  # a victim, the youngest, has not been planned yet
            if seq.state is not State.RUNNING or self._ends(seq) or seq.unready:
                continue
            forced = _is_forced(seq)
            if _is_prompt(seq, seq.num_scheduled) and not forced:
                continue
            if seq.waits and seq.length > seq.num_tokens:
                continue
            assert seq.blocks is not None  # running sequences hold blocks
            length = seq.length
            while not self.kv.can_extend(seq.blocks, length):
                if launched:
                    return None
                # blocks that were announced to a decode node stay: it may be reading them
                victim = max((s for s in reversed(self.running) if not s.handoff), key=by_age, default=seq)
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                self.kv.extend(seq.blocks, length)
                start = seq.num_scheduled if forced else length - 1
                count = min(length - start, 1 + max(0, spare))
                spare -= count - 1
                works.append(Work(seq, start, count, start + count == length))
        return sorted(works, key=lambda work: work.num_tokens > 1)  # single rows first: executors decode those

    def _ends(self, seq: Sequence) -> bool:
        """Whether what is in flight samples the last token there will be."""
        return seq.length > seq.num_tokens and (seq.handoff or seq.length >= self.limit(seq))

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.close_blocks(seq)
        seq.num_computed = seq.num_scheduled = 0
        seq.state = State.WAITING
        insort_left(self.waiting, seq, key=by_age)
        self.num_preemptions += 1

    def _plan_prefill(self, works: list[Work], seq: Sequence, budget: int, over: int) -> int:
        """Adds as much of ``seq`` as the budget allows, and ``over`` more where that is all of it: few tokens are not
        worth a step of their own. Returns what is left for other prompts.

        Nothing is left once the device is saturated: a second prompt would not be done sooner for sharing the step,
        and the first would wait for it.
        """
        start = seq.num_scheduled
        rest = seq.num_tokens - start
        count = rest if budget > 0 and rest <= budget + over else min(rest, budget)
        if seq.sampling.prompt_logprobs >= 0 and start < seq.num_prompt:
            count = min(count, PROMPT_LOGPROBS_CHUNK)
        if start + count == seq.num_tokens and seq.unready:
            count -= 1
        if count > 0:
            works.append(Work(seq, start, count, start + count == seq.num_tokens))
        saturated = sum(work.num_tokens for work in works) >= self.limits.saturating_tokens
        return 0 if saturated else max(0, budget - count)

    def _admit(self, works: list[Work], budget: int, over: int) -> None:
        prompts = [s for s in self.running if _is_prompt(s, s.num_computed)] + self.loading
        computing = {key for s in prompts if (key := self._next_block(s)) is not None}
        end = bisect_left(self.waiting, self.outside_s, key=by_age) if self.outside_s < math.inf else len(self.waiting)
        at = 0
        while at < end and budget > 0 and self.num_placed < self.limits.max_num_seqs:
            seq = self.waiting[at]
            if not self._open(seq):
                break
            key = self._next_block(seq)
            if key in computing:  # the same prompt is being computed: wait for the prefix cache to have it
                self.close_blocks(seq)
                at += 1
                continue
            if seq.output_index == 0:
                self.prefix_queries += seq.num_tokens
                self.prefix_hits += seq.num_cached
            if key is not None:
                computing.add(key)
            del self.waiting[at]
            end -= 1
            self.pace.placed(time.monotonic())
            if self.further is not None and self.further.fetch(seq):
                self.loading.append(seq)
                continue
            assert seq.blocks is not None
            self.kv.extend(seq.blocks, seq.num_tokens)
            self.join(seq)
            budget = self._plan_prefill(works, seq, budget, over)

    def _open(self, seq: Sequence) -> bool:
        """Gives a waiting sequence its cached prefix, if the rest of its prompt has room too."""
        # the last token is always computed: its logits are wanted
        limit = 0 if seq.sampling.prompt_logprobs >= 0 else seq.num_tokens - 1
        match = self.kv.match(seq.tokens, limit, seq.salt)
        blocks = self.kv.open(match)
        if not self.kv.can_extend(blocks, seq.num_tokens, reserve=self.num_placed):
            self.kv.close(blocks)
            return False
        seq.blocks = blocks
        seq.num_computed = match.num_tokens
        seq.num_cached = min(match.num_tokens, seq.num_prompt)
        return True

    def _next_block(self, seq: Sequence) -> tuple[PrefixNode, bytes] | None:
        """The prefix-tree place of the next full block that ``seq`` computes; None where it has none."""
        assert seq.blocks is not None
        first, size = seq.blocks.num_committed, self.kv.layout.block_size
        if not self.kv.prefix_caching or (first + 1) * size > seq.num_tokens - 1:
            return None
        return seq.blocks.node, block_keys(seq.tokens, size, first, first + 1)[0]

    def collected(self, work: Work) -> bool:
        """Books a computed piece of work: its KV is in its blocks now. False: its sequence has ended meanwhile."""
        seq = work.seq
        seq.num_computed = work.end
        if seq.state is State.RUNNING:
            assert seq.blocks is not None
            self.kv.commit(seq.blocks, seq.tokens, seq.num_computed)
            return True
        if not seq.in_flight:
            self.close_blocks(seq)
        return False

    def failed(self, work: Work) -> None:
        """Takes back a piece of work that nothing came of, and nothing after it is in flight."""
        seq = work.seq
        seq.num_scheduled = work.start
        if seq.state is State.FINISHED and not seq.in_flight:
            self.close_blocks(seq)

    @property
    def num_placed(self) -> int:
        """Sequences with blocks that the scheduler gave them."""
        return len(self.running) + len(self.loading)

    @property
    def has_prompts(self) -> bool:
        """Whether the next plan may have more in it than decodes."""
        return bool(self.waiting) or any(_is_prompt(s, s.num_scheduled) for s in self.running)

    @property
    def waiting_tokens(self) -> int:
        """Tokens still to be computed before the sequences here can decode."""
        return sum(s.num_tokens - s.num_computed for s in (*self.waiting, *self.loading)) + sum(
            max(0, s.num_tokens - s.num_computed - 1) for s in self.running
        )


def _is_prompt(seq: Sequence, num_done: int) -> bool:
    """Whether with ``num_done`` tokens there is more to be computed than the last one, which decodes."""
    return num_done + 1 < seq.num_tokens or num_done == 0


def _is_forced(seq: Sequence) -> bool:
    """Whether what is to be computed is output of which but the first token was not sampled."""
    return seq.num_prompt <= seq.num_scheduled + 1 < seq.num_tokens <= seq.num_scheduled + MAX_DECODE_TOKENS
