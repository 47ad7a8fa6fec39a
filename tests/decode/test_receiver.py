"""An engine's ability to receive: answered at once, placed by age, nothing lost for lack of room or freed too early."""

from __future__ import annotations

import math

import numpy as np

from pd_serve.decode.inbox import Arrived, Drained, Event, Failed, Offered
from pd_serve.decode.receiver import InboxReceiver
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.errors import FailureKind
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.wire.link import Output, Peers, SamplingParams, Source

BLOCK = 4
SOURCE = Source("p", "e", ("tcp://127.0.0.1:1",))


class ScriptedInbox:
    """Says what the test puts into it."""

    def __init__(self) -> None:
        self.coming: list[Event] = []
        self.accepted: list[str] = []
        self.first: dict[str, list[int]] = {}  # that is to be pulled, a group
        self.cancelled: list[str] = []
        self.silent = False
        self.connected: list[Source] = []

    def expect(self, key: str, source: Source) -> None: ...

    def accept(self, key: str, tables: object, first: list[int]) -> None:
        self.accepted.append(key)
        self.first[key] = first

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)
        if not self.silent:
            self.coming.append(Drained(key))

    def connect(self, source: Source) -> None:
        self.connected.append(source)

    def events(self) -> list[Event]:
        coming, self.coming = self.coming, []
        return coming

    def close(self) -> bool:
        return True


class Decode:
    def __init__(self, blocks: int, local_prefill_tokens: int = 0) -> None:
        self.kv = KVManager(KVLayout(BLOCK, "float32", (kv_group((0,), 1, 8),)), (blocks,), 256)
        self.scheduler = Scheduler(self.kv, Limits(8, 64, 1000, 100, 10.0, 255))
        self.inbox = ScriptedInbox()
        self.role = InboxReceiver(self.kv, self.scheduler, self.inbox, local_prefill_tokens)  # type: ignore[arg-type]
        self.seqs: dict[str, Sequence] = {}

    def submit(
        self, name: str, tokens: int, arrival_s: float, source: Source | None = SOURCE, *, like: bool = False
    ) -> str | None:
        """``like``: it begins as the first one does."""
        array = np.arange(tokens, dtype=np.int32) + (0 if like else 100 * len(self.seqs))
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

    def hears(self, *events: Event) -> list[tuple[str, Output]]:
        self.inbox.coming += events
        return [(seq.id, output) for seq, output in self.role.events()]

    def used(self) -> int:
        return self.kv.usage()[0].used


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


# --- the end of a pull ----------------------------------------------------------------------------------


def test_what_has_arrived_runs_from_its_second_token_on() -> None:
    d = Decode(blocks=9)
    d.submit("a", 10, 0.0)
    d.offer("a")
    ((name, output),) = d.hears(Arrived("a", 7, 1000, 0.1))
    seq = d.seqs["a"]
    assert (name, output.event, output.index, output.tokens) == ("a", "arrived", 0, [])
    assert seq.state is State.RUNNING and (seq.num_computed, seq.num_tokens) == (10, 11)
    assert int(seq.tokens[10]) == 7 and (d.role.pulling, d.role.queued) == (0, 0)
    (work,) = d.scheduler.plan() or ()
    assert (work.seq, work.start, work.num_tokens) == (seq, 10, 1)
    assert d.hears(Arrived("a", 7, 1000, 0.1), Drained("a")) == [], "it is nobody's any more"


def test_only_what_is_not_here_is_pulled_and_what_is_whole_is_offered_to_others() -> None:
    d = Decode(blocks=17)
    d.submit("a", 16, 0.0)
    d.offer("a")
    d.hears(Arrived("a", 7, 1000, 0.1, whole_from=(0,)))
    d.submit("b", 22, 1.0, like=True)
    d.offer("b")
    assert d.inbox.first == {"a": [0], "b": [4]}
    ((_, output),) = d.hears(Arrived("b", 7, 1000, 0.1))
    assert output.num_cached == 16
    parts = Decode(blocks=17)
    parts.submit("a", 16, 0.0)
    parts.offer("a")
    parts.hears(Arrived("a", 7, 1000, 0.1, whole_from=(2,)))
    parts.submit("b", 16, 1.0, like=True)
    parts.offer("b")
    assert parts.inbox.first["b"] == [0], "its first blocks have holes"


def test_a_pull_that_fails_is_told_at_once_and_its_blocks_wait_until_nothing_can_write_them() -> None:
    d = Decode(blocks=9)
    d.submit("a", 12, 0.0)
    d.offer("a")
    held = d.used()
    ((name, output),) = d.hears(Failed("a", FailureKind.EXPIRED, "too late"))
    assert name == "a" and output.failure is not None
    assert (output.failure.kind, output.failure.message) == ("transfer", "expired: too late")
    assert d.used() == held > 0 and d.seqs["a"].state is State.FINISHED
    assert d.hears(Failed("a", FailureKind.EXPIRED, "again")) == [], "once"
    assert d.hears(Drained("a")) == []
    assert d.used() == 0 and not d.kv.usage()[0].cached and d.role.pulling == 0


def test_an_abort_keeps_the_blocks_too_and_an_arrival_on_its_way_is_the_end() -> None:
    for end in (Drained("a"), Arrived("a", 7, 1000, 0.1)):
        d = Decode(blocks=9)
        d.inbox.silent = True
        d.submit("a", 12, 0.0)
        d.offer("a")
        held = d.used()
        d.role.ended(d.seqs["a"])
        assert d.inbox.cancelled == ["a"] and d.used() == held > 0
        assert d.hears(end) == []
        assert d.used() == 0 and d.role.pulling == 0 and not d.scheduler.running


def test_a_request_that_waits_for_room_leaves_the_queue_when_it_is_aborted() -> None:
    d = Decode(blocks=5)
    d.submit("a", 12, 0.0)
    d.submit("b", 12, 1.0)
    assert d.offer("a", "b") == ["a"]
    d.role.ended(d.seqs["b"])
    assert d.scheduler.outside_s == 1.0
    d.offer()
    assert d.scheduler.outside_s == math.inf and (d.role.pulling, d.role.queued) == (1, 0)
    d.role.ended(d.seqs["a"])
    assert d.offer() == ["a"] and d.role.pulling == 0


def test_short_prompts_and_those_that_are_here_are_computed_here() -> None:
    d = Decode(blocks=17, local_prefill_tokens=4)
    assert d.submit("short", 4, 0.0) == "local"
    assert d.seqs["short"].state is State.WAITING and d.role.pulling == 0
    assert d.submit("long", 5, 0.0) == "accepted"
    d = Decode(blocks=17, local_prefill_tokens=4)
    d.submit("a", 16, 0.0)
    d.offer("a")
    d.hears(Arrived("a", 7, 1000, 0.1))
    assert d.submit("like it", 20, 1.0, like=True) == "local"
    assert d.submit("longer", 21, 1.0, like=True) == "accepted"


def test_sources_that_may_be_named_are_dialled_ahead_of_use() -> None:
    d = Decode(blocks=9)
    d.role.peers(Peers([SOURCE]))
    assert d.inbox.connected == [SOURCE]
