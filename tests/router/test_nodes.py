"""What the router knows of its nodes: what is in flight, whose text and limits count, who cannot work with whom."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from pd_serve.api.text_model import TextModel
from pd_serve.router.breaker import Breakers
from pd_serve.router.groups import Group, Registry
from pd_serve.router.nodes import MAX_MET, Node
from pd_serve.wire import link
from pd_serve.wire.chunks import pack
from tests.api import tiny
from tests.router.test_stream import ManualClock


class Work:
    """An attempt that only counts."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.losses = 0

    def output(self, node: Node, output: link.Output, now_s: float) -> None: ...

    def lost(self, node: Node, why: str) -> None:
        self.losses += 1


def make(role: str, number: int = 0, *, layout: str = "x", **info: Any) -> Node:
    model = msgspec.structs.replace(tiny.info(), **info)
    hello = link.Hello(
        2, f"{role[0]}{number}", role, "http://n", model, layout, "e", ("tcp://x",), "test", 0, link.Load(0, 0, 0, [])
    )
    return Node(hello, lambda _: None)


def submit(id: str, tokens: int, source: bool = False) -> link.Submit:
    sampling = link.SamplingParams(max_tokens=4, seed=0)
    return link.Submit(
        id, bytes(4 * tokens), 0, sampling, source=link.Source("p0", "e", ("tcp://x",)) if source else None
    )


def joined(registry: Registry, *nodes: Node) -> Group:
    group = None
    for node in nodes:
        if not registry.knows(node.hello.model):
            registry.add_group(TextModel(tiny.bundle(), node.hello.model))
        registry.add(node)
        group = registry.group(node.hello.model)
    assert group is not None
    return group


def test_a_status_counts_what_it_includes_and_nothing_else() -> None:
    node = make("prefill")
    for number in range(4):
        assert node.submit(Work(f"a{number}"), submit(f"a{number}", 2000))
    assert node.view().waiting_tokens == 8000 and node.view().sequences == 4
    for included in range(5):
        load = link.Load(included, 0, 2000 * included, [])
        node.status(link.Status(load, last_submit=included))
        assert node.view().waiting_tokens == 8000, included
        assert node.view().sequences == 4, included


def test_a_decode_node_with_a_source_computes_no_prompt() -> None:
    node = make("decode")
    work = Work("a")
    node.submit(work, submit("a", 2000, source=True))
    assert node.view().waiting_tokens == 0 and node.view().sequences == 1
    node.release(work, abort=False)
    assert node.view().sequences == 0


def test_when_requests_queue_at_a_node() -> None:
    node = make("decode")
    assert not node.view().queueing and not node.view().full
    usage = [link.GroupUsage(100, 90, 0, 10)]
    node.status(link.Status(link.Load(0, 9, 0, usage, queued=1, max_queue=3)))
    assert not node.view().queueing  # there is room for one more
    for id in "ab":
        node.submit(Work(id), submit(id, 10, source=True))
    assert node.view().queueing and node.view().full
    node.status(link.Status(link.Load(0, 0, 0, usage, queue_wait_s=0.5, max_queue=3), last_submit=2))
    assert node.view().queueing and not node.view().full


def test_a_lost_node_tells_every_attempt_whatever_one_of_them_does() -> None:
    registry = Registry()
    node, other = make("decode"), make("decode", 1)
    joined(registry, node, other)
    works = [Work(f"a{n}") for n in range(3)]

    def lost(lost_node: Node, why: str) -> None:
        registry.remove(other, "too")

    works[0].lost = lost  # type: ignore[method-assign]
    for work in works:
        node.submit(work, submit(work.id, 5))
    moved = Work("b")
    other.submit(moved, submit("b", 5))
    registry.remove(node, "gone")
    assert [work.losses for work in (*works[1:], moved)] == [1, 1, 1]
    assert not registry.nodes() and not node.tell(link.Abort(["a0"]))


# --- groups follow their nodes --------------------------------------------------------------------------


def test_the_limit_is_what_some_pair_can_hold_whoever_came_first() -> None:
    small, large, prefill = make("decode", 1, max_model_len=336), make("decode", 2), make("prefill", max_model_len=400)
    for order in ((small, large, prefill), (prefill, small, large), (large, prefill, small)):
        registry = Registry()
        group = joined(registry, *(make(n.role, int(n.id[1:]), **_info(n)) for n in order))
        assert group.info.max_model_len == 400
        registry.remove(group.decode["d2"], "left")
        assert group.info.max_model_len == 336
        registry.remove(group.prefill["p0"], "left")
        assert group.info.max_model_len == 336


def _info(node: Node) -> dict[str, Any]:
    return {"max_model_len": node.hello.model.max_model_len}


def test_a_restarted_node_brings_its_text_and_its_limit() -> None:
    registry = Registry()
    old = make("decode", text="old", max_model_len=100)
    group = joined(registry, old)
    before = group.text
    registry.remove(old, "restarts")
    assert registry.find("tiny") is None and not registry.knows(make("decode", text="new").hello.model)
    joined(registry, make("decode", text="new", max_model_len=200))
    assert group is registry.find("tiny") and group.text is not before and group.info.max_model_len == 200
    assert before.info.max_model_len == 100  # streams that have it keep it


def test_while_two_texts_live_the_newer_is_used() -> None:
    registry = Registry()
    old, new = make("decode", 1, text="old"), make("decode", 2, text="new")
    group = joined(registry, old, new)
    assert group.info.text == "new"
    joined(registry, make("prefill", 3, text="old"))
    assert group.info.text == "new"
    registry.remove(new, "left")
    assert group.info.text == "old" and not registry.knows(new.hello.model)


# --- misfits and breakers -------------------------------------------------------------------------------


def test_a_misfit_is_named_once_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    registry = Registry(clock.now_s)
    group = joined(registry, *(make(role, number) for role in ("prefill", "decode") for number in (0, 1)))
    refusal = {"p1": "it does not know this node's secret"}
    for _ in range(3):
        clock.advance(1.0)
        for decode in list(group.decode.values()):
            registry.status(decode, link.Status(link.Load(0, 0, 0, []), misfits=refusal))
    assert group.troubles() == {"p1": ("misfit", refusal["p1"])} and group.serving() == (1, 2)
    assert [r.levelno for r in caplog.records if "p1" in r.getMessage()] == [logging.WARNING]
    assert set(group.troubles(due=False)) == {"p1"} and group.unfit().keys() == {("p1", "d0"), ("p1", "d1")}
    registry.status(group.decode["d0"], link.Status(link.Load(0, 0, 0, [])))
    assert not group.troubles() and group.serving() == (2, 2)


def test_a_prefill_node_of_another_layout_is_a_misfit_a_decode_node_is_not() -> None:
    group = joined(Registry(), make("prefill", 0), make("decode", 0), make("prefill", 1, layout="y"))
    assert set(group.troubles()) == {"p1"}
    group = joined(Registry(), make("prefill", 0), make("decode", 0), make("decode", 1, layout="y"))
    assert not group.troubles()


def test_a_prefill_node_of_another_model_under_the_same_name_is_a_misfit(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    registry = Registry(clock.now_s)
    ours = joined(registry, make("prefill", 0), make("decode", 0))
    stranger = make("prefill", 1, fingerprint="other")
    group = joined(registry, stranger)
    for _ in range(3):
        clock.advance(1.0)
        registry.status(stranger, link.Status(link.Load(0, 0, 0, [])))
    state, reason = group.troubles()["p1"]
    assert state == "misfit" and "other" in reason and ours.info.fingerprint in reason and not ours.troubles()
    assert group.serving() == (0, 0)
    assert [r.levelno for r in caplog.records if "p1" in r.getMessage()] == [logging.WARNING]
    joined(registry, make("decode", 1, fingerprint="other"))
    assert not group.troubles()
    registry.remove(ours.decode["d0"], "it left")
    joined(registry, make("prefill", 2, fingerprint="third"))
    registry.remove(group.decode["d1"], "it left")
    assert not any(group.troubles() for group in registry.groups.values())  # nobody to differ from


def test_who_only_fails_gets_single_trials_after_growing_pauses() -> None:
    clock = ManualClock()
    breakers = Breakers(clock.now_s)
    assert [breakers.failed("d0", "why") for _ in range(3)] == [False, False, True]
    assert "why" in breakers.blocked()["d0"]
    assert not breakers.failed("d0", "late")  # what ran there already
    pauses = []
    for _ in range(8):
        begun_s = clock.now_s()
        while "d0" in breakers.blocked():
            clock.advance(0.5)
        pauses.append(clock.now_s() - begun_s)
        breakers.tried("d0")
        assert "d0" in breakers.blocked()  # one at a time
        assert breakers.failed("d0", "again")
    assert pauses == sorted(pauses) and pauses[0] == 1 and pauses[-1] == 60
    clock.advance(60)
    breakers.tried("d0")
    clock.advance(60)
    assert "d0" not in breakers.blocked()  # a trial without a verdict is followed by another
    breakers.succeeded("d0")
    assert not breakers


# --- roles


def told(node: Node) -> list[link.ToNode]:
    said: list[link.ToNode] = []
    node._send = said.append
    return said


def test_a_node_of_both_roles_serves_alone_and_counts_as_both() -> None:
    registry = Registry()
    node = make("both")
    said = told(node)
    group = joined(registry, node)
    assert group.serving() == (1, 1) and group.nodes() == [node] and group.troubles() == {}
    assert said == [link.GetPrefixes()], "it does not read from itself"
    other = make("both", 1)
    joined(registry, other)
    assert said[-1] == link.Peers([other.source])
    assert node.title == "node b0"


def test_a_node_of_both_roles_that_cannot_exchange_is_no_misfit() -> None:
    registry = Registry()
    node, other = make("both"), make("both", 1)
    group = joined(registry, node, other)
    registry.status(node, link.Status(node.load, misfits={other.id: "models differ"}))
    assert group.unfit() == {(other.id, node.id): "models differ"} and group.troubles() == {}
    alone = make("both", 2, layout="y")
    joined(registry, alone)
    assert group.troubles() == {}


def test_a_role_is_taken_at_once_and_attempts_stay() -> None:
    registry = Registry()
    prefill, decode = make("prefill"), make("decode")
    group = joined(registry, prefill, decode)
    said = told(decode)
    work = Work("a")
    decode.submit(work, submit("a", 20))
    woken: list[str] = []
    group.waiting[work] = 0.0, lambda: woken.append("a")
    registry.role(prefill, link.Role("decode", ("tcp://x",)))
    assert (list(group.prefill), list(group.decode)) == ([], ["d0", "p0"]) and woken == ["a"]
    assert not any(isinstance(message, link.Peers) for message in said), "nobody is there to read from"
    registry.role(decode, link.Role("prefill", ("tcp://new",)))
    assert (list(group.prefill), list(group.decode)) == (["d0"], ["p0"])
    assert decode.source.addresses == ("tcp://new",)
    assert list(decode.attempts) == ["a"] and work.losses == 0
    registry.remove(decode, "gone")
    registry.role(decode, link.Role("both", ()))
    assert (list(group.prefill), group.nodes(), work.losses) == ([], [prefill], 1)


# --- what nodes say of their caches


def test_what_a_node_tells_of_its_cache_and_what_is_lost_of_it() -> None:
    registry = Registry()
    node, silent = make("prefill"), make("prefill", 1)
    said = told(node)
    group = joined(registry, node, silent, make("decode"))
    assert link.GetPrefixes() in said
    known = group.sources.prefixes

    def tell(number: int, stored: list[int], evicted: list[int] | None = None, *, whole: bool = False) -> set[int]:
        registry.cached(node, link.Prefixes(number, pack(stored), pack(evicted or []), whole=whole))
        return known.names(node.id)

    assert tell(4, [9]) == set(), "before the whole"
    assert tell(5, [1, 2], whole=True) == {1, 2}
    assert tell(5, [7]) == {1, 2}, "the whole had it"
    assert tell(6, [3], [1]) == {2, 3}
    said.clear()
    assert tell(8, [4]) == {2, 3} and said == [link.GetPrefixes()], "the 7th is missing"
    assert tell(9, [5]) == {2, 3} and len(said) == 1
    assert tell(9, [2, 4, 5], whole=True) == {2, 4, 5}
    # its own word counts, not what the router saw it compute; of others nothing better is known
    group.computed(node, [100, 101], 0)
    group.computed(silent, [100, 101], 0)
    assert tell(10, []) == {2, 4, 5} and known.names(silent.id) == {100, 101}
    with pytest.raises(ValueError, match="9 bytes"):
        registry.cached(node, link.Prefixes(11, bytes(9)))
    registry.remove(node, "gone")
    assert known.names(node.id) == set()


# --- many nodes


def test_a_join_among_many_nodes_costs_a_few_frames() -> None:
    registry, said = Registry(), list[tuple[str, link.ToNode]]()
    for number in range(200):
        role = ("prefill", "decode")[number % 2]
        node = make(role, number)
        node.host = f"host{number // 8}"
        node._send = lambda message, id=node.id: said.append((id, message))  # type: ignore[misc]
        joined(registry, node)
        told_of = [(id, source.node_id) for id, m in said if isinstance(m, link.Peers) for source in m.sources]
        assert len(said) <= MAX_MET + 1, "its own question, and those that meet it"
        assert len(told_of) == min(MAX_MET, (number + 1) // 2), number
        if number % 8 == 7:  # its host's are among them
            assert {f"p{number - 1 - 2 * place}" for place in range(3)} <= {source for _, source in told_of}
        said.clear()
    registry.remove(node, "left")
    assert said == []
