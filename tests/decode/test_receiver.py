"""A decode engine's admission: answered at once, placed by age, and nothing lost for lack of room."""

from __future__ import annotations

import math

import numpy as np

from pd_serve.decode.inbox import Drained, Event, Offered
from pd_serve.decode.receiver import InboxReceiver
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.wire.link import SamplingParams, Source

BLOCK = 4
SOURCE = Source("p", "e", ("tcp://127.0.0.1:1",))


class ScriptedInbox:
    """Says what the test puts into it."""

    def __init__(self) -> None:
        self.coming: list[Event] = []
        self.accepted: list[str] = []

    def expect(self, key: str, source: Source) -> None: ...

    def accept(self, key: str, tables: object, first: object) -> None:
        self.accepted.append(key)

    def cancel(self, key: str) -> None:
        self.coming.append(Drained(key))

    def events(self) -> list[Event]:
        coming, self.coming = self.coming, []
        return coming

    def close(self) -> bool:
        return True


class Decode:
    def __init__(self, blocks: int) -> None:
        self.kv = KVManager(KVLayout(BLOCK, "float32", (kv_group((0,), 1, 8),)), (blocks,), 256)
        self.scheduler = Scheduler(self.kv, Limits(8, 64, 1000, 100, 10.0, 255))
        self.inbox = ScriptedInbox()
        self.role = InboxReceiver(self.kv, self.scheduler, self.inbox, 0)  # type: ignore[arg-type]
        self.seqs: dict[str, Sequence] = {}

    def submit(self, name: str, tokens: int, arrival_s: float, source: Source | None = SOURCE) -> str | None:
        array = np.arange(tokens, dtype=np.int32) + 100 * len(self.seqs)
        params = SamplingParams(max_tokens=8, seed=0)
        seq = Sequence(name, 1, array, tokens, params, capacity=256, source=source, arrival_s=arrival_s)
        self.seqs[name] = seq
        if source is None:
            self.scheduler.add(seq)
            return None
        return self.role.submitted(seq, source).event

    def offer(self, *names: str) -> list[str]:
        """The KV of these is ready; who has been given blocks so far."""
        self.inbox.coming += [Offered(name, 4) for name in names]
        assert list(self.role.events()) == []
        return self.inbox.accepted


def test_a_request_is_accepted_at_once_and_counts_as_queued_until_it_has_blocks() -> None:
    d = Decode(blocks=9)
    assert d.submit("a", 12, 0.0) == "accepted"
    assert d.role.queued == 1
    d.offer("a")
    assert d.role.queued == 0


def test_blocks_go_to_the_oldest_request_whoever_is_ready_first() -> None:
    d = Decode(blocks=9)  # 8 usable
    for name, tokens, arrival_s in (("first", 24, 1.0), ("young", 4, 9.0), ("large", 28, 5.0), ("old", 8, 2.0)):
        d.submit(name, tokens, arrival_s)
    assert d.offer("first") == ["first"]
    assert d.offer("young", "large", "old") == ["first"]  # one block is left for "first" to grow
    assert d.scheduler.outside_s == 2.0
    d.role.ended(d.seqs["first"])
    assert d.offer() == ["first", "old"]
    assert d.scheduler.outside_s == 5.0
    d.role.ended(d.seqs["old"])
    assert d.offer() == ["first", "old", "large"]  # and "young", which would fit, did not overtake it
    d.role.ended(d.seqs["young"])
    d.offer()
    assert d.scheduler.outside_s == math.inf and d.role.queued == 0


def test_sequences_that_are_computed_here_take_turns_with_those_that_are_pulled_by_age() -> None:
    d = Decode(blocks=9)
    d.submit("local", 28, 3.0, source=None)
    d.submit("older", 8, 1.0)
    d.submit("younger", 8, 5.0)
    assert d.offer("older", "younger") == ["older"]
    assert [w.seq.id for w in d.scheduler.plan()] == []  # no room beside "older"
    assert d.offer() == ["older"]  # the younger one waits for "local"
    d.role.ended(d.seqs["older"])
    d.offer()
    assert [w.seq.id for w in d.scheduler.plan()] == ["local"]
