"""The real loop, scheduler and KV manager under random orders of events, with an executor that knows all tokens.

Whatever comes between the launch and the collection of a step: every sequence ends exactly once, its tokens are those
of its own text, each once and in order, and every block is back in the end.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from pd_serve.compute.executor import TAGS
from pd_serve.engine.arrivals import Arrivals
from pd_serve.engine.core import Engine
from pd_serve.engine.lifecycle import Lifecycle
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.grammar.constraints import Constraints
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.kv.tiered import TieredKVManager
from pd_serve.wire import engine as wire
from pd_serve.wire import link
from tests.engine.fake import (
    EOS,
    FAILS_IN_COLLECT,
    FAILS_IN_LAUNCH,
    VOCAB,
    FakeCopies,
    FakeExecutor,
    FakeRole,
    logprob,
    next_token,
)
from tests.engine.harness import MODEL

EXAMPLES = int(os.environ.get("LOOP_EXAMPLES", "150"))
MAX_LEN = 44
FULL, WINDOW = kv_group((0,), 1, 8), kv_group((1,), 1, 8, window=7)
STARTS = [[2, 3, 4, 5, 6, 7, 8, 9, 2, 2, 3, 3, 4, 4, 5, 5], [5, 4, 3, 2, 9, 8, 7, 6]]  # prompts share them


@dataclass(frozen=True)
class Request:
    """``kind``: computed here, computed and sent, or received. ``known``: output tokens of an earlier attempt."""

    kind: str
    prompt: tuple[int, ...]
    known: int
    age_s: int
    sampling: link.SamplingParams

    @property
    def poisoned(self) -> bool:
        return bool({FAILS_IN_LAUNCH, FAILS_IN_COLLECT} & set(self.prompt))

    def text(self) -> tuple[list[int], str | None]:
        """All output tokens, and why it ends with the last."""
        tokens, finish = list(self.prompt), None
        while finish is None:
            tokens.append(self._next(tokens))
            finish = self._finish(tokens)
            if len(tokens) - len(self.prompt) <= self.known:
                finish = None  # of an attempt that went on
            elif self.kind == "handoff":
                break
        return tokens[len(self.prompt) :], finish

    def _next(self, tokens: list[int]) -> int:
        p, index = self.sampling, len(tokens) - len(self.prompt)
        ends = {*p.stop_token_ids, *(() if p.ignore_eos else (EOS,))} if index < p.min_tokens else set()
        if self.kind == "pull" and index == self.known:
            return next_token(tuple(tokens), p.seed, index)  # the other node's token, here the plain one
        output = tokens[len(self.prompt) :]
        for *before, last in p.bad_words:
            if output[len(output) - len(before) :] == before:
                ends.add(last)
        if p.allowed_token_ids:
            ends |= set(range(FAILS_IN_LAUNCH)).difference(p.allowed_token_ids)
        return next_token(tuple(tokens), p.seed, index, ends)

    def _finish(self, tokens: list[int]) -> str | None:
        p, index = self.sampling, len(tokens) - len(self.prompt)
        if self.kind == "pull" and index == self.known + 1:
            return None  # the other node goes on with this one only where nothing ends it
        if (tokens[-1] == EOS and not p.ignore_eos) or tokens[-1] in p.stop_token_ids:
            return "stop"
        return "length" if index >= p.max_tokens or len(tokens) >= MAX_LEN else None

    def submit(self, name: str) -> link.Submit:
        tokens = [*self.prompt, *self.text()[0][: self.known]]
        return link.Submit(
            name,
            array("i", tokens).tobytes(),
            self.known,
            self.sampling,
            handoff=self.kind == "handoff",
            source=link.Source("p", "e", ["tcp://host:1"]) if self.kind == "pull" else None,
            age_s=self.age_s,
        )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    start = draw(st.sampled_from(STARTS))
    prompt = start[: draw(st.integers(1, len(start)))] + draw(st.lists(st.integers(0, 9), max_size=10))
    if draw(st.integers(0, 9)) == 9:
        prompt.append(draw(st.sampled_from([FAILS_IN_LAUNCH, FAILS_IN_COLLECT])))
    sampling = link.SamplingParams(
        max_tokens=draw(st.sampled_from([4, 9, 20, 30])),
        seed=draw(st.integers(0, 2**64 - 1)),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        logit_bias=draw(st.sampled_from([{}, {4: 1.0}])),
        allowed_token_ids=draw(st.sampled_from([(), (), (2, 4, 6, 8)])),
        bad_words=draw(st.sampled_from([(), (), ((4, 6), (5,), (2, 2, 2))])),
        stop_token_ids=draw(st.sampled_from([(), (), (), (3,)])),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        prompt_logprobs=draw(st.sampled_from([-1, -1, -1, 0])),
    )
    kind = draw(st.sampled_from(["local", "local", "local", "handoff", "pull"]))
    request = Request(kind, tuple(prompt), 0, draw(st.integers(0, 5)), sampling)
    known = min(draw(st.sampled_from([0, 0, 2])), len(request.text()[0]) - 1, sampling.max_tokens - 3)
    return Request(kind, request.prompt, max(0, known) if kind == "local" else 0, request.age_s, sampling)


EVENTS = st.one_of(
    st.tuples(st.just("submit"), requests()),
    st.tuples(st.just("submit"), requests()),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.sampled_from(["place", "arrive", "lose", "release"]), st.none()),
    st.tuples(st.just("fail"), st.sampled_from(["launch", "collect"])),
    st.tuples(st.just("sleep"), st.booleans()),
    st.tuples(st.just("wake"), st.none()),
    st.tuples(st.just("drop"), st.integers(1, 2)),
    st.tuples(st.just("late"), st.booleans()),
    st.tuples(st.just("turns"), st.integers(2, 6)),
    st.tuples(st.just("copies"), st.tuples(st.integers(0, 3), st.sampled_from([False, False, True]))),
    st.tuples(st.just("forget"), st.none()),
)


@dataclass
class Stream:
    """What a router has sent and heard of one attempt."""

    request: Request
    origin: int
    heard: list[link.Output] = field(default_factory=list)
    silent: bool = False  # nothing may be heard any more


class Wire:
    """The engine's channel, without a socket."""

    def __init__(self) -> None:
        self.inbox: list[tuple[int, bytes]] = []
        self.streams: dict[str, Stream] = {}
        self.answers: dict[int, wire.SleepState] = {}
        self.status: link.Status
        self.socket: zmq.Socket[bytes]

    def receive(self) -> Iterator[tuple[int, bytes]]:
        came, self.inbox = self.inbox, []
        yield from came

    def send_router(self, origin: int, outputs: link.Outputs) -> None:
        for output in outputs.items:
            stream = self.streams[output.id]
            # what answers a submit may go out with the abort right behind it
            assert origin == stream.origin and not (stream.silent and output.tokens), f"{output} was not asked for"
            stream.heard.append(output)

    def send_node(self, message: Any) -> None:
        if isinstance(message, wire.SleepState):
            assert message.number not in self.answers and not message.failure
            self.answers[message.number] = message
        elif isinstance(message, wire.Report):
            self.status = message.status


class World:
    def __init__(
        self,
        depth: int,
        blocks: int,
        budget: int,
        windowed: bool,
        constraints: Constraints | None = None,
        tier: str = "",
        slots: int = 15,
    ) -> None:
        groups = (FULL, WINDOW) if windowed else (FULL,)
        layout, counts = KVLayout(4, "float32", groups), (blocks,) * len(groups)
        self.kv = KVManager(layout, counts, MAX_LEN + 1)
        if tier:
            places = (slots,) * len(groups)
            self.kv = TieredKVManager(layout, counts, MAX_LEN + 1, num_slots=places, eager=tier == "eager")
        self.executor = FakeExecutor(layout, depth)
        self.copies = FakeCopies(self.executor, layout.block_size)
        self.scheduler = Scheduler(self.kv, Limits(4, budget, 1000, 1000, 1e9, MAX_LEN))
        arrivals = None
        if isinstance(self.kv, TieredKVManager):
            arrivals = Arrivals(self.kv, self.scheduler, self.copies)
        self.wire = Wire()
        pulse = Pulse(zmq.Context.instance(), "inproc://nobody", 1.0, 1.0)  # not started
        self.lifecycle = Lifecycle(self, self.open(), self.kv, self.executor, pulse, arrivals)
        self.engine = Engine(
            kv=self.kv,
            scheduler=self.scheduler,
            executor=self.executor,
            lifecycle=self.lifecycle,
            channel=self.wire,  # type: ignore[arg-type]
            pulse=pulse,
            eos_token_ids=(EOS,),
            status_interval_s=1.0,
            vocab_size=VOCAB,
            constraints=constraints,
            arrivals=arrivals,
        )
        self.orders = 0

    def open(self) -> FakeRole:
        self.role = FakeRole(self.kv, self.scheduler, self.executor)
        return self.role

    def introduce(self, role: object, load: link.Load, start_s: dict[str, float]) -> wire.EngineReady:
        return wire.EngineReady(MODEL, "l", "layout", "e", "tcp://here:1", "nixl", load, start_s)

    def tell(self, message: wire.ToEngine) -> None:
        self.wire.inbox.append((0, wire.encoder.encode(message)))

    def happens(self, what: str, value: Any) -> None:
        streams = self.wire.streams
        match what:
            case "submit":
                name, origin = f"s{len(streams)}", 1 + len(streams) % 2
                streams[name] = Stream(value, origin)
                self.wire.inbox.append((origin, link.encoder.encode(value.submit(name))))
            case "abort" if value < len(streams):
                stream = streams[f"s{value}"]
                stream.silent = True
                self.wire.inbox.append((stream.origin, link.encoder.encode(link.Abort([f"s{value}"]))))
            case "drop":
                self._silence(value)
                self.tell(wire.Drop(value))
            case "sleep" | "wake" | "forget" if len(self.wire.answers) < self.orders:
                pass  # a node gives one order after another
            case "sleep":
                self.orders += 1
                self.tell(wire.Sleep(self.orders, 1))
                if value:
                    self._silence()
                    self.tell(wire.Sleep(self.orders, 1, now=True))
            case "wake":
                self.orders += 1
                self.tell(wire.Wake(self.orders, list(TAGS)))
            case "forget":
                self.orders += 1
                self.tell(wire.Forget(self.orders))
            case "copies":
                self.copies.pace, self.copies.fail = value
            case "fail":
                self.executor.fails = value
            case "late":
                self.executor.late = value
            case "place" | "arrive" | "lose" | "release":
                self.role.due.append(what)

    def _silence(self, origin: int | None = None) -> None:
        """A router that is gone, or an engine told to sleep at once, ends streams without a word."""
        for stream in self.wire.streams.values():
            if origin is None or stream.origin == origin:
                stream.silent = True

    def turn(self) -> bool:
        worked = self.engine.turn()
        self.kv.check()
        return worked

    def settle(self) -> None:
        """Everything comes to its end."""
        self.executor.fails = ""
        for _ in range(1000):
            self.role.due += ["place", "arrive", "release"]
            self.copies.pace = 3
            busy = self.turn() or self.engine.load().pulling or self.engine.load().leases or self.wire.inbox
            busy = busy or bool(self.copies.asked)
            if not busy and not self.lifecycle.leaving:
                return
            if not busy and self.lifecycle.level:
                self.happens("wake", None)
        raise AssertionError("it never ends")


def check_stream(world: World, stream: Stream) -> None:
    """What was heard is the text from where this attempt began, each token once, and one end."""
    request = stream.request
    text, finish = request.text()
    heard = [o for o in stream.heard if o.event is None]
    first = request.known + (request.kind == "pull")
    index = first
    for output in heard:
        if output.failure is None:
            assert output.index == index and output.tokens == text[index : index + 1]
            index += 1
    ends = [o for o in heard if o.finish or o.failure]
    assert not ends or (len(ends) == 1 and heard[-1] is ends[0])
    if request.sampling.prompt_logprobs >= 0 and request.kind != "pull" and index > first:
        prompt = request.prompt
        wanted = [None, *(link.TokenLogprob(prompt[i], logprob(prompt[:i]), 1, []) for i in range(1, len(prompt)))]
        assert heard[0].prompt_logprobs == wanted
    if stream.silent:
        return
    if ends and ends[0].failure:
        kind = ends[0].failure.kind
        if currently_in_test_context():
            event(f"failed: {kind}")
        if kind == "internal":
            world.executor.failed_alone -= not request.poisoned
            assert world.executor.failed_alone >= 0, "it failed for another's sake"
        else:
            assert kind == {"pull": "transfer"}.get(request.kind, "refused") or kind == "refused"
        return
    assert index == len(text), "the text has no end"
    assert (ends[0].finish if ends else None) == finish


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    depth=st.sampled_from([0, 1]),
    blocks=st.integers(12, 17),
    budget=st.integers(3, 40),
    windowed=st.booleans(),
    tier=st.sampled_from(["", "eager", "lazy"]),
    events=st.lists(st.tuples(EVENTS, st.integers(0, 2)), min_size=4, max_size=50),
)
def test_whatever_happens_between_launch_and_collect(
    depth: int, blocks: int, budget: int, windowed: bool, tier: str, events: list[tuple[tuple[str, Any], int]]
) -> None:
    world = World(depth, blocks, budget, windowed, tier=tier)
    for (what, value), turns in events:
        world.happens(what, value)
        for _ in range(value if what == "turns" else turns):
            world.turn()
    world.settle()
    for stream in world.wire.streams.values():
        check_stream(world, stream)
    world.kv.check(idle=True)
    event(f"preempted: {world.scheduler.num_preemptions > 0}, depth {depth}")
    event(f"tier: {tier}, brought back: {world.copies.loaded > 0}")
    event(f"steps failed: {world.wire.status.counters['step_failures'] > 0}")
    assert world.wire.status.counters["leaks"] == 0
    assert len(world.wire.answers) == world.orders
    world.engine.close()
