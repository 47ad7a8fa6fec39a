"""Every request ends exactly once, whatever raises and in whatever order links are lost; nothing is left behind."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.api.errors import APIError
from pd_serve.config import RouterConfig
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.router.stream import Shared, Stream
from pd_serve.wire import link
from tests.api import tiny
from tests.router.test_stream import PROMPT, TEXT, ManualClock

TOKENS = 4
TROUBLES = ["", "", "", "", "", "", "", "", "raise", "lose", "lose another"]  # of a send
ACTIONS = ["begin", "begin", "speak", "speak", "speak", "speak", "speak", "lose", "add", "stop", "tick"]


@dataclass
class Sink:
    """Counts the ends that its client would have seen."""

    raises: str
    tokens: list[int] = field(default_factory=list)
    ends: int = 0
    seen: int = 0  # calls of failed(), those that raised included
    started: bool = False
    stream: Stream = field(init=False)

    def received(self, output: link.Output, now_s: float) -> None:
        assert not self.ends
        if self.raises == "end" and output.finish is not None:
            raise ValueError("a sink that fails at the end")
        if self.raises == "stop":
            self.stream.stop("stop_string")
            raise ValueError("a sink that fails at a stop string")
        if self.raises == "tokens":
            raise ValueError("a sink that fails")
        self.started = True
        self.tokens += output.tokens
        self.ends += output.finish is not None

    def failed(self, error: APIError) -> None:
        assert not self.ends and not self.seen
        self.seen += 1
        if self.raises == "failed":
            raise ValueError("a sink that cannot be told")
        self.ends += 1


class Endings:
    """Nodes without a mind: every word of theirs is drawn."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.calm = False
        self.clock = ManualClock()
        self.registry = Registry(self.clock.now_s)
        self.group = self.registry.add_group(TEXT)
        config = RouterConfig(node_wait_s=2.0, request_timeout_s=30.0)
        self.shared = Shared(config, self.clock, lambda *_: None)
        self.jobs: dict[str, dict[str, link.Submit]] = {}  # by node, by attempt
        self.streams: list[tuple[Stream, Sink]] = []
        self.stopped: set[int] = set()
        self._numbers = itertools.count()

    def add_node(self, role: str) -> None:
        id = f"{role}-{next(self._numbers)}"
        jobs = self.jobs[id] = {}
        hello = link.Hello(
            1, id, role, f"http://{id}", tiny.info(), "layout", "e", ("tcp://x",), "test", 0, link.Load(0, 0, 0, [])
        )

        def send(message: link.ToNode) -> None:
            trouble = "" if self.calm else self.data.draw(st.sampled_from(TROUBLES))
            if trouble == "raise":
                raise RuntimeError("cannot send")
            if isinstance(message, link.Submit):
                jobs[message.id] = message
            elif isinstance(message, link.Abort):
                for attempt in message.ids:
                    jobs.pop(attempt, None)
            if trouble == "lose":
                self.lose(id)
            elif trouble == "lose another":
                self.lose(self.data.draw(st.sampled_from(sorted(self.jobs))))

        self.registry.add(Node(hello, send))

    def lose(self, id: str) -> None:
        node = self.registry.get(id)
        if node is not None:
            self.registry.remove(node, "lost")

    def begin(self) -> None:
        raises = self.data.draw(st.sampled_from(["", "end", "tokens", "stop", "failed"]))
        sink = Sink(raises)
        sampling = link.SamplingParams(max_tokens=TOKENS, seed=0, temperature=0)
        stream = Stream(self.shared, self.group, PROMPT, sampling, sink, f"r{len(self.streams)}")
        sink.stream = stream
        self.streams.append((stream, sink))
        stream.start()

    def speak(self) -> None:
        """A linked node says something of one of its jobs, however wrong it is by now."""
        open_jobs = [(id, job) for id, jobs in self.jobs.items() if self.registry.get(id) for job in jobs.values()]
        if not open_jobs:
            return
        id, job = self.data.draw(st.sampled_from(open_jobs))
        node = self.registry.get(id)
        assert node is not None
        say = self.data.draw(st.sampled_from(["event", "event", "token", "rest", "rest", "failure", "absurd"]))
        index = job.num_output
        if say == "event":
            event = self.data.draw(st.sampled_from(["accepted", "arrived", "local"]))
            output = link.Output(job.id, index, [], event=event)
        elif say == "token":
            output = link.Output(job.id, index, [index + 1])
        elif say == "rest":
            tokens = list(range(index + 1, TOKENS + 1))
            output = link.Output(job.id, index, tokens, finish="length")
        elif say == "failure":
            kind = self.data.draw(st.sampled_from(["refused", "internal", "transfer", "invalid"]))
            output = link.Output(job.id, index, [], failure=link.Failure(kind, "as drawn"))
        else:
            output = self.data.draw(
                st.sampled_from(
                    [
                        link.Output(job.id, -3, [1]),
                        link.Output(job.id, -1, [], finish="length"),
                        link.Output(job.id, index, [-7]),
                        link.Output(job.id, 2**40, [1]),
                        link.Output(job.id, index, [1], finish="because"),
                    ]
                )
            )
        node.outputs([output], self.clock.now_s())

    def check_open(self) -> None:
        """Whatever is open waits for something that can still happen."""
        for stream in self.shared.active:
            attempt = stream._attempt
            if attempt is None:
                assert stream in self.group.waiting or stream in self.group.line or stream._timer is not None
                continue
            for node in (attempt.prefill, attempt.decode):
                if node is not None:
                    assert node.alive and node.attempts[attempt.id] is attempt
                    assert attempt.id in self.jobs[node.id] or (attempt.postponed and node is attempt.prefill)

    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for stream in list(self.shared.active):
            stream.check_time(self.clock.now_s())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_request_ends_exactly_once(data: st.DataObject) -> None:
    logging.disable(logging.CRITICAL)
    try:
        _any_order(Endings(data), data)
    finally:
        logging.disable(logging.NOTSET)


def _any_order(world: Endings, data: st.DataObject) -> None:
    for role in ("prefill", "decode", "decode"):
        world.add_node(role)
    for _ in range(data.draw(st.integers(10, 40))):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "begin" and len(world.streams) < 6:
            world.begin()
        elif action == "speak":
            world.speak()
        elif action == "lose":
            world.lose(data.draw(st.sampled_from(sorted(world.jobs))))
        elif action == "add" and len(world.jobs) < 8:
            world.add_node(data.draw(st.sampled_from(["prefill", "decode"])))
        elif action == "stop" and world.streams:
            place = data.draw(st.integers(0, len(world.streams) - 1))
            world.streams[place][0].stop("client")
            world.stopped.add(place)
        elif action == "tick":
            world.tick(1.0)
        world.check_open()
    world.calm = True
    for _ in range(40):  # nobody says anything any more: time alone ends what is left
        world.tick(1.0)
    for place, (stream, sink) in enumerate(world.streams):
        assert stream.done
        if place in world.stopped:
            assert sink.ends <= 1
        elif sink.raises == "failed":
            assert sink.ends + sink.seen == 1
        else:
            assert sink.ends == 1
    assert not world.shared.active and not world.group.waiting and not len(world.group.line)
    for id, jobs in world.jobs.items():
        node = world.registry.get(id)
        assert node is None or not node.attempts
        assert node is None or all(job.id not in node.attempts for job in jobs.values())
