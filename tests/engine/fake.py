"""An executor and a role that compute nothing and know everything: which token each slot holds, and who may touch it.

The KV of a token stands for all tokens up to it, so a slot holds that prefix: whoever reads another one's KV, a stale
one or one of another position is found out. What is sampled is a function of the prefix and of how it is sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pd_serve.compute.executor import TAGS
from pd_serve.compute.step import NO_LINE, Bias, Sampled, SamplingRow, Step
from pd_serve.engine.role import Role
from pd_serve.engine.scheduler import Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.layout import KVLayout
from pd_serve.kv.manager import KVManager, SequenceBlocks
from pd_serve.kv.tiers import Copy
from pd_serve.memory.region import PoolMemory
from pd_serve.wire.link import Failure, Output, TokenLogprob
from pd_serve.wire.memory import MemoryReport

Prefix = tuple[int, ...]
Place = tuple[int, int]  # group and slot

VOCAB = 12
EOS = 1
FAILS_IN_LAUNCH, FAILS_IN_COLLECT = VOCAB - 2, VOCAB - 1  # prompts' tokens that no step can be computed with


def next_token(prefix: Prefix, seed: int, index: int, forbidden: Collection[int] = ()) -> int:
    token = (hash((prefix, seed, index)) >> 7) % FAILS_IN_LAUNCH
    while token in forbidden:
        token = (token + 1) % FAILS_IN_LAUNCH
    return token


def logprob(prefix: Prefix) -> float:
    return -(hash(prefix) % 1000) / 100


def _forbidden(bias: Bias) -> set[int]:
    values = dict(zip(bias.tokens.tolist(), bias.values.tolist(), strict=True))
    others = set(range(FAILS_IN_LAUNCH)).difference(values) if bias.only else set()
    return {token for token, value in values.items() if value == -np.inf} | others


class Refusal(Exception):
    """What an executor raises that cannot compute."""


class Wrong(BaseException):
    """It was asked for what must never be asked; no exception, as an engine would go on after one."""


@contextmanager
def found_out() -> Iterator[None]:
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        raise Wrong(repr(error)) from error


@dataclass
class InFlight:
    step: Step
    touched: set[Place]  # what it reads and writes
    result: Sampled | None = None
    failure: str = ""


class FakeExecutor:
    """Of a depth. A step is computed when it is launched or, if ``late``, when it is collected: devices choose."""

    def __init__(self, layout: KVLayout, depth: int) -> None:
        self.depth = depth
        self.late = True
        self.fails = ""  # "launch" or "collect": the next one, whatever it is
        self.failed_alone = 0  # steps of one sequence that were told to fail
        self.asleep: list[str] = []
        self.kv: dict[Place, Prefix] = {}
        self.launched: list[InFlight] = []
        self._layout = layout
        self._samples: list[int] = []  # of the step computed last
        self._histories: dict[int, list[int]] = {}
        self._forbidden: dict[int, set[int]] = {}

    # --- steps

    @found_out()
    def launch(self, step: Step) -> InFlight:
        assert not self.asleep and len(self.launched) <= self.depth
        written = self._written(step)
        for other in self.launched:
            assert not written & other.touched, "a step is launched onto blocks that another in flight uses"
        if self._fails("launch", step):
            self._compute_all()
            self._spoil(step)
            raise Refusal("launch")
        flight = InFlight(step, written | self._read(step))
        if self._fails("collect", step) or any(other.failure for other in self.launched):
            flight.failure = "collect"  # a step after one that fails reads anything
        self.launched.append(flight)
        if not self.late or not self.depth:
            self._compute_all()
        return flight

    @found_out()
    def collect(self, launched: InFlight) -> Sampled:
        assert self.launched[0] is launched, "steps are collected in order"
        if launched.result is None:
            self._compute(launched)
        self.launched.pop(0)
        if launched.failure:
            raise Refusal(launched.failure)
        assert launched.result is not None
        return launched.result

    def done(self, launched: InFlight) -> bool:
        return True

    @property
    def touched(self) -> set[Place]:
        """What no transfer may write to now, and nobody may take for free."""
        return set().union(*(flight.touched for flight in self.launched))

    def _compute_all(self) -> None:
        for flight in self.launched:
            if flight.result is None:
                self._compute(flight)

    def _compute(self, flight: InFlight) -> None:
        if flight.failure:
            self._spoil(flight.step)
            flight.result = Sampled([], [], [])
        else:
            flight.result = self._computed(flight.step)
            self._samples = flight.result.tokens

    def _fails(self, where: str, step: Step) -> bool:
        poison = FAILS_IN_LAUNCH if where == "launch" else FAILS_IN_COLLECT
        if poison in step.tokens:
            return True
        told = self.fails == where
        if told:
            self.fails = ""
            self.failed_alone += step.num_seqs == 1
        return told

    def _spoil(self, step: Step) -> None:
        """A step that fails leaves anything behind."""
        for place in self._written(step):
            self.kv.pop(place, None)
        for line in set(step.sampling["history"].tolist()) - {NO_LINE}:
            self._histories[line] = []
        for bias in step.biases:
            self._forbidden[bias.line] = set()
        self._samples = []

    def _computed(self, step: Step) -> Sampled:
        tokens = self._tokens(step)
        prefixes: list[Prefix] = []  # of each row of T
        for seq in range(step.num_seqs):
            begin, end = int(step.query_start[seq]), int(step.query_start[seq + 1])
            start = int(step.seq_lens[seq]) - (end - begin)
            assert step.positions[begin:end].tolist() == list(range(start, start + end - begin))
            prefix = self._context(step, seq, start)
            for row in range(begin, end):
                prefix += (tokens[row],)
                prefixes.append(prefix)
                for group, slots in enumerate(step.slots):
                    self.kv[group, int(slots[row])] = prefix
        return self._sample(step, [prefixes[row] for row in step.logits_rows])

    def _tokens(self, step: Step) -> list[int]:
        tokens: list[int] = step.tokens.tolist()
        for row, sample in enumerate(step.from_samples.tolist()):
            if sample >= 0:
                tokens[row] = self._samples[sample]
        return tokens

    def _context(self, step: Step, seq: int, start: int) -> Prefix:
        """What the tokens before ``start`` are, by their KV; each that is seen must be of one and the same text."""
        prefix: Prefix = ()
        for group in range(len(step.block_tables)):
            for position in self._seen(group, start):
                found = self.kv[group, self._slot(step, seq, group, position)]
                assert len(found) == position + 1, "KV of another position"
                assert found[: len(prefix)] == prefix[: len(found)], "KV of another text"
                prefix = max(prefix, found, key=len)
        return prefix

    def _sample(self, step: Step, logits: list[Prefix]) -> Sampled:
        for history in step.histories:
            self._histories[history.line] = [*history.prompt.tolist(), *history.output.tolist()]
        self._forbidden |= {bias.line: _forbidden(bias) for bias in step.biases}
        tokens = []
        for row, values in zip(step.sampled_rows, step.sampling.tolist(), strict=True):
            params, prefix = SamplingRow._make(values), logits[row]
            forbidden = self._forbidden[params.bias] if params.bias != NO_LINE else set()
            if params.mask != NO_LINE:
                mask = int(step.masks.reshape(-1, 1)[params.mask, 0])
                forbidden = forbidden | {token for token in range(VOCAB) if not mask >> token & 1}
            tokens.append(next_token(prefix, params.seed, params.output_index, forbidden))
            if params.history != NO_LINE:
                assert self._histories[params.history] == list(prefix), "penalties of another text"
                self._histories[params.history].append(tokens[-1])
        prompts = [
            [
                TokenLogprob(target, logprob(logits[rows.first + i]), 1, [])
                for i, target in enumerate(rows.targets.tolist())
            ]
            for rows in step.prompt_rows
        ]
        return Sampled(tokens, [None] * len(tokens), prompts)

    # --- places

    def _seen(self, group: int, position: int) -> range:
        window = self._layout.groups[group].window
        return range(0 if window is None else max(0, position - window + 1), position)

    def _slot(self, step: Step, seq: int, group: int, position: int) -> int:
        size = self._layout.block_size
        block = int(step.block_tables[group][seq, position // size])
        assert block, "a token that is seen has no block"
        return block * size + position % size

    def _written(self, step: Step) -> set[Place]:
        places = {(group, int(slot)) for group, slots in enumerate(step.slots) for slot in slots}
        assert len(places) == step.num_tokens * len(step.slots), "two tokens go to one slot"
        assert all(slot >= self._layout.block_size for _, slot in places), "the null block is written to"
        return places

    def _read(self, step: Step) -> set[Place]:
        starts = step.seq_lens - np.diff(step.query_start)
        return {
            (group, self._slot(step, seq, group, position))
            for seq, start in enumerate(starts.tolist())
            for group in range(len(step.block_tables))
            for position in self._seen(group, start)
        }

    # --- the rest of an executor

    def memory(self) -> list[PoolMemory]:
        return []

    def load(self) -> None:
        """It has no weights."""

    def warm_up(self) -> None:
        """Nor kernels."""

    @found_out()
    def sleep(self, level: int) -> None:
        assert not self.launched
        self.kv.clear()
        self.asleep = list(TAGS)

    def wake(self, tags: Collection[str]) -> None:
        self.asleep = [tag for tag in self.asleep if tag not in tags]

    def report(self) -> MemoryReport:
        return MemoryReport("fake", {}, asleep=self.asleep)

    def close(self) -> None:
        """It owns nothing."""


@dataclass(frozen=True)
class Ended:
    ticket: int
    whole: bool
    seconds: float = 1.0


class FakeCopies:
    """To and from a host tier. They end when they are told to, and only then read and write."""

    def __init__(self, executor: FakeExecutor, block_size: int) -> None:
        self.pace = 3  # how many end at each look
        self.fail = False  # the next does
        self.loaded = 0
        self.asked: list[tuple[bool, int, list[Copy], list[Prefix | None]]] = []  # a load, what it is to bring
        self._executor = executor
        self._size = block_size
        self._host: dict[Place, Prefix | None] = {}

    def _slots(self, group: int, number: int) -> list[Place]:
        return [(group, slot) for slot in range(number * self._size, (number + 1) * self._size)]

    def fileno(self) -> int:
        return -1

    def load(self, ticket: int, copies: list[Copy]) -> None:
        self.asked.append((True, ticket, copies, self._stored(copies)))

    def store(self, ticket: int, copies: list[Copy]) -> None:
        self.asked.append((False, ticket, copies, []))

    def _stored(self, copies: list[Copy]) -> list[Prefix | None]:
        return [self._host[place] for copy in copies for place in self._slots(copy.group, copy.slot)]

    @found_out()
    def ended(self) -> list[Ended]:
        ended = []
        for turn in range(min(self.pace, len(self.asked))):
            # each direction by itself is in order
            at = next((i for i, each in enumerate(self.asked) if each[0] is (turn % 2 == 0)), 0)
            load, ticket, copies, before = self.asked.pop(at)
            assert not load or before == self._stored(copies), "what is being loaded was given up"
            whole, self.fail = not self.fail, False
            for group, block, slot in copies if whole else ():
                for device, host in zip(self._slots(group, block), self._slots(group, slot), strict=True):
                    if load:
                        assert device not in self._executor.touched, "a copy writes to a block that a step uses"
                        self._executor.kv[device] = self._host[host]  # type: ignore[assignment]
                    else:
                        self._host[host] = self._executor.kv.get(device)
            self.loaded += load and whole
            ended.append(Ended(ticket, whole))
        return ended

    def drain(self) -> None:
        self.pace = len(self.asked)

    def discard(self) -> None:
        assert not self.asked
        self._host.clear()

    def close(self) -> None:
        """It owns nothing."""


class FakeRole(Role):
    """Sends and receives. What it receives comes when it is told so: first it takes blocks, then the KV is there."""

    queued = leases = pulling = 0  # type: ignore[assignment]

    def __init__(self, kv: KVManager, scheduler: Scheduler, executor: FakeExecutor) -> None:
        super().__init__()
        self._kv = kv
        self._scheduler = scheduler
        self._executor = executor
        self._expected: list[Sequence] = []  # without blocks
        self._placed: list[Sequence] = []
        self._leased: list[tuple[SequenceBlocks, Prefix]] = []
        self.due: list[str] = []  # what happens at the next events()

    def submitted(self, seq: Sequence) -> Output | None:
        if seq.source is None:
            return None
        seq.state = State.PULLING
        self._expected.append(seq)
        self._count()
        return Output(id=seq.id, index=seq.output_index, tokens=[], event="accepted")

    def computed(self, seq: Sequence, token: int | None) -> None:
        assert seq.state is State.RUNNING and seq.blocks is not None
        if seq.handoff and token is not None:
            self._leased.append((seq.blocks, tuple(seq.tokens[: seq.num_computed].tolist())))
            seq.blocks = None
            self._scheduler.detach(seq)
            self._count()

    def ended(self, seq: Sequence, reason: str) -> None:
        if seq.state is State.PULLING:
            seq.state = State.FINISHED
            if seq in self._expected:
                self._expected.remove(seq)
            self._count()

    def events(self) -> Iterator[tuple[Sequence, Output]]:
        for what in self.due:
            if what == "place" and self._expected and self._place(self._expected[0]):
                self._placed.append(self._expected.pop(0))
            elif what == "arrive" and self._placed:
                yield from self._arrive(self._placed.pop(0))
            elif what == "lose" and self._expected:
                seq = self._expected.pop(0)
                seq.state = State.FINISHED
                yield seq, Output(id=seq.id, index=seq.output_index, tokens=[], failure=Failure("transfer", "lost"))
            elif what == "release" and self._leased:
                self._release()
        self.due.clear()
        self._count()

    def _place(self, seq: Sequence) -> bool:
        blocks = self._kv.open(self._kv.match(seq.tokens, seq.num_tokens))
        if not self._kv.can_extend(blocks, seq.num_tokens, len(self._scheduler.running), live_only=True):
            self._kv.close(blocks)
            return False
        first = blocks.num_blocks
        self._kv.extend(blocks, seq.num_tokens, live_only=True)
        seq.blocks = blocks
        # the transfer begins at once, and is done when it is done
        for place, prefix in self._places(blocks, tuple(seq.tokens.tolist()), first):
            assert place not in self._executor.touched, "a transfer writes to a block that a step uses"
            self._executor.kv[place] = prefix
        return True

    def _arrive(self, seq: Sequence) -> Iterator[tuple[Sequence, Output]]:
        assert seq.blocks is not None
        prompt = tuple(seq.tokens.tolist())
        for place, prefix in self._places(seq.blocks, prompt, 0):
            assert self._executor.kv[place] == prefix, "a block was written to that a transfer fills"
        if seq.state is not State.PULLING:
            self._scheduler.close_blocks(seq)
            return
        seq.num_computed = seq.num_tokens
        first = [self._kv.layout.first_live_block(g, seq.num_tokens) for g in range(len(seq.blocks.tables))]
        self._kv.commit(seq.blocks, seq.tokens, seq.num_computed, first)
        yield seq, Output(id=seq.id, index=seq.output_index, tokens=[], event="arrived")
        seq.append(next_token(prompt, seq.sampling.seed, seq.output_index))
        self._scheduler.join(seq)

    @found_out()
    def _release(self) -> None:
        blocks, prompt = self._leased.pop(0)
        for place, prefix in self._places(blocks, prompt, 0):
            assert self._executor.kv[place] == prefix, "a leased block was written to"
        self._kv.close(blocks)

    def _places(self, blocks: SequenceBlocks, text: Prefix, first: int) -> Iterator[tuple[Place, Prefix]]:
        size = self._kv.layout.block_size
        for group, table in enumerate(blocks.tables):
            for position in range(max(first, blocks.first[group]) * size, len(text)):
                if block := int(table[position // size]):
                    yield (group, block * size + position % size), text[: position + 1]

    def _count(self) -> None:
        self.queued, self.pulling, self.leases = len(self._expected), len(self._placed), len(self._leased)
        self.pulling += len(self._expected)

    def close(self) -> bool:
        while self._leased:
            self._release()
        return super().close()
