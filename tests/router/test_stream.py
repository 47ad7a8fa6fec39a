"""The life of a stream under any order of events, with simulated nodes and time: exact text or one clear error."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.api.errors import APIError
from pd_serve.api.text_model import TextModel
from pd_serve.config import RouterConfig
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.router.stream import Shared, Stream
from pd_serve.wire import link
from tests.api import tiny
from tests.router.scripted_node import expected, next_token

TEXT = TextModel(tiny.bundle(), tiny.info())
PROMPT = [5, 6, 7, 8, 9]


@dataclass
class _Timer:
    due_s: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    def __init__(self) -> None:
        self._now_s = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        return self._now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(self._now_s + delay_s, callback)
        heapq.heappush(self._timers, (timer.due_s, next(self._numbers), timer))
        return timer

    def sleep(self, by_s: float) -> None:
        """The process does not run: timers are late."""
        self._now_s += by_s

    def advance(self, by_s: float) -> None:
        end_s = self._now_s + by_s
        while self._timers and self._timers[0][0] <= end_s:
            due_s, _, timer = heapq.heappop(self._timers)
            self._now_s = max(self._now_s, due_s)
            if not timer.cancelled:
                timer.callback()
        self._now_s = end_s


@dataclass
class Job:
    submit: link.Submit
    tokens: list[int]
    index: int
    arrived: bool = False
    local: bool = False
    accepted: bool = False


class SimNode:
    """Does one thing each time it is asked to: what it says next about one of its jobs."""

    def __init__(self, world: World, role: str, number: int) -> None:
        self.world = world
        self.jobs: dict[str, Job] = {}
        hello = link.Hello(
            1, f"{role}-{number}", role, f"http://{role}-{number}", tiny.info(), "layout", "e", ("tcp://x",), "test", 0,
            link.Load(0, 0, 0, []),
        )  # fmt: skip
        self.node = Node(hello, self.receive)
        world.registry.add(self.node)

    def receive(self, message: link.ToNode) -> None:
        match message:
            case link.Submit() as submit:
                assert submit.id not in self.jobs
                tokens = list(array("i", submit.tokens))
                assert tokens[: len(PROMPT)] == PROMPT
                assert tokens[len(PROMPT) :] == self.world.sink.tokens, "a resumed attempt has what the client has"
                self.jobs[submit.id] = Job(submit, tokens, submit.num_output)
            case link.Abort(ids=ids):
                for id in ids:
                    self.jobs.pop(id, None)

    def say(self, id: str, **fields: object) -> None:
        fields = {"index": 0, "tokens": [], **fields}
        self.node.outputs([link.Output(id, **fields)], self.world.clock.now_s())  # type: ignore[arg-type]

    def fail(self, job: Job, kind: str) -> None:
        del self.jobs[job.submit.id]
        self.say(job.submit.id, index=job.index, failure=link.Failure(kind, "as told", retry_after_s=0.5))

    def step(self, job: Job, local: bool, count: int) -> None:
        id = job.submit.id
        if job.submit.source is not None and not job.accepted and not local:
            job.accepted = True
            self.say(id, index=job.index, event="accepted")
            return
        if job.submit.source is not None and not job.arrived and not job.local:
            if local:
                job.local = True
                self.say(id, index=job.index, event="local")
            elif id in self.world.ready:
                job.arrived = True
                job.tokens.append(self.world.ready[id])
                job.index += 1
                if count > 1:  # the word about it is not always the first that comes
                    self.say(id, index=job.index, event="arrived")
            return
        made: list[int] = []
        index = job.index
        for _ in range(1 if job.submit.handoff else count):
            made.append(next_token(job.tokens))
            job.tokens.append(made[-1])
            job.index += 1
            if job.index == job.submit.sampling.max_tokens:
                break
        finished = job.index == job.submit.sampling.max_tokens
        if finished or job.submit.handoff:
            self.jobs.pop(id)
        if job.submit.handoff and not finished:
            self.world.ready[id] = made[-1]
        self.say(id, index=index, tokens=made, finish="length" if finished else None)


@dataclass
class RecordingSink:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: APIError | None = None

    @property
    def started(self) -> bool:
        return bool(self.tokens)

    def received(self, output: link.Output, now_s: float) -> None:
        assert self.finish is None and self.error is None, "nothing comes after the end"
        self.tokens += output.tokens
        self.finish = output.finish

    def failed(self, error: APIError) -> None:
        assert self.finish is None and self.error is None, "one end only"
        self.error = error


class World:
    def __init__(self, max_tokens: int, **options: float) -> None:
        self.clock = ManualClock()
        self.registry = Registry(self.clock.now_s)
        self.group = self.registry.add_group(TEXT)
        self.ready: dict[str, int] = {}
        self.sink = RecordingSink()
        self.counts: list[tuple[str, str]] = []
        limits = RouterConfig(**{"max_attempts": 10_000, "node_wait_s": 5.0, **options})  # type: ignore[arg-type]
        self.shared = Shared(limits, self.clock, lambda name, kind: self.counts.append((name, kind)))
        sampling = link.SamplingParams(max_tokens=max_tokens, seed=0, temperature=0)
        self.stream = Stream(self.shared, self.group, PROMPT, sampling, self.sink, "r")
        self.nodes: list[SimNode] = []
        self.gone: list[SimNode] = []
        self._numbers = itertools.count()

    def add(self, role: str) -> SimNode:
        node = SimNode(self, role, next(self._numbers))
        self.nodes.append(node)
        return node

    def kill(self, node: SimNode) -> None:
        self.nodes.remove(node)
        self.gone.append(node)
        self.registry.remove(node.node, "killed")

    def jobs(self, nodes: list[SimNode] | None = None) -> list[tuple[SimNode, Job]]:
        return [(n, job) for n in (self.nodes if nodes is None else nodes) for job in n.jobs.values()]

    def check_end(self) -> None:
        assert not self.shared.active and not self.group.waiting
        assert not self.jobs(), "every node has been told"
        assert not any(n.node.attempts for n in (*self.nodes, *self.gone))


ACTIONS = ("step",) * 10 + ("late", "kill", "add", "tick", "transfer", "internal", "refused")


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(0, 2), st.integers(1, 2))
def test_any_order_of_events(data: st.DataObject, max_tokens: int, prefill: int, decode: int) -> None:
    world = World(max_tokens)
    for role, count in (("prefill", prefill), ("decode", decode)):
        for _ in range(count):
            world.add(role)
    world.stream.start()
    for _ in range(data.draw(st.integers(0, 60))):
        action = data.draw(st.sampled_from(ACTIONS))
        jobs = world.jobs(world.gone if action == "late" else None)
        if action == "kill" and len(world.nodes) > 1:
            world.kill(data.draw(st.sampled_from(world.nodes)))
        elif action == "add" and len(world.nodes) < 5:
            world.add(data.draw(st.sampled_from(["prefill", "decode"])))
        elif action == "tick":
            world.clock.advance(0.3)
        elif jobs:
            node, job = data.draw(st.sampled_from(jobs))
            if action in ("step", "late"):  # a node that is gone still talks to itself
                node.step(job, data.draw(st.booleans()), data.draw(st.integers(1, 3)))
            elif action in ("transfer", "internal", "refused"):
                node.fail(job, action)
        assert world.sink.tokens == expected(PROMPT, len(world.sink.tokens))
        if world.sink.error is not None:
            # The only errors that are right: nobody was there for long, or all refused before the first token.
            assert world.sink.error.status in (429, 503)
            assert world.sink.error.status != 429 or not world.sink.tokens
            world.check_end()
            return
    for role in ("prefill", "decode"):
        world.add(role)
    for _ in range(200):
        if world.sink.finish is not None:
            break
        world.clock.advance(0.3)
        for node, job in world.jobs():
            if job.submit.id in node.jobs:
                node.step(job, False, 1)
    assert world.sink.error is None
    assert world.sink.finish == "length"
    assert world.sink.tokens == expected(PROMPT, max_tokens)
    world.check_end()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2))
def test_a_stop_at_any_moment_reaches_all_nodes(steps: int, prefill: int) -> None:
    world = World(50)
    for _ in range(prefill):
        world.add("prefill")
    world.add("decode")
    world.stream.start()
    for _ in range(steps):
        for node, job in world.jobs():
            node.step(job, False, 1)
    world.stream.stop("client")
    world.check_end()
    world.stream.stop("client")
    assert world.sink.finish is None and world.sink.error is None
    assert world.counts.count(("aborts", "client")) == 1


def test_waiting_for_a_node_ends(start: float = 5.0) -> None:
    world = World(5, node_wait_s=start)
    world.add("prefill")
    world.stream.start()
    world.clock.advance(start - 0.1)
    assert world.sink.error is None
    world.clock.advance(0.2)
    assert world.sink.error is not None and world.sink.error.status == 503
    world.check_end()


def test_while_the_router_drains_nobody_waits_for_a_node() -> None:
    world = World(5)
    world.shared.draining = True
    world.stream.start()
    world.clock.advance(0.0)
    assert world.sink.error is not None and world.sink.error.status == 503


def test_no_progress_ends_it() -> None:
    world = World(5, request_timeout_s=10.0)
    world.add("decode")
    world.stream.start()
    world.clock.advance(9.0)
    world.stream.check_time(world.clock.now_s())
    (node, job) = world.jobs()[0]
    node.step(job, False, 1)
    world.clock.advance(9.0)
    world.stream.check_time(world.clock.now_s())
    assert world.sink.error is None
    world.clock.advance(2.0)
    world.stream.check_time(world.clock.now_s())
    assert world.sink.error is not None and world.sink.error.status == 504
    world.check_end()


def test_decode_may_be_faster_than_the_first_token() -> None:
    """Two links, no order between them: what comes too early waits, and is complete at once."""
    world = World(4)
    prefill, decode = world.add("prefill"), world.add("decode")
    world.stream.start()
    (id,) = prefill.jobs
    output = expected(PROMPT, 4)
    decode.jobs.clear()
    decode.say(id, index=2, tokens=output[2:], finish="length")
    decode.say(id, index=1, tokens=output[1:2])
    assert world.sink.tokens == []
    prefill.jobs.clear()
    prefill.say(id, index=0, tokens=output[:1])
    assert world.sink.tokens == output and world.sink.finish == "length"
    world.check_end()
