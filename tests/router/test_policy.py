"""Placement: least load, equal layouts, nothing that drains, failed or refused where there is something better."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pd_serve.router.field import Field, NodeView, sources, targets
from pd_serve.router.policy import Nowhere, Placement, Terms, longest
from pd_serve.router.policy import place as place_on
from pd_serve.router.policy import reader as reader_in
from pd_serve.wire.chunks import CHUNK_TOKENS


def view(id: str, **fields: Any) -> NodeView:
    defaults = {
        "layout": "a", "sequences": 0, "waiting_tokens": 0, "kv_used": 0.0, "draining": False, "local_prefill_tokens": 0
    }  # fmt: skip
    return NodeView(id, **{**defaults, **fields})


def field(made: Field, views: list[NodeView]) -> Field:
    for view in views:
        made.put(view)
    return made


def place(
    prefill: list[NodeView],
    decode: list[NodeView],
    *,
    prompt_tokens: int,
    last_token: bool = False,
    local: bool = False,
    held: dict[str, int] | None = None,
    **terms: Any,
) -> Placement | Nowhere:
    """``held``: how many chunks of ``PROMPT`` a node has."""
    p, d = field(sources(), prefill), field(targets(), decode)
    for id, count in (held or {}).items():
        (p if p.get(id) is not None else d).prefixes.stored(id, PROMPT[:count])
    found = place_on(
        p,
        d,
        Terms(prompt_tokens=prompt_tokens, **terms),
        last_token=last_token,
        local=local,
    )
    return found._replace(cached=0) if isinstance(found, Placement) else found


def reader(source: NodeView, decode: list[NodeView], terms: Terms) -> str | None:
    return reader_in(source, field(targets(), decode), terms)


PROMPT = list(range(1, 17))  # names of 16 chunks
TOKENS = len(PROMPT) * CHUNK_TOKENS
P, D = [view("p0"), view("p1")], [view("d0"), view("d1")]


def test_least_loaded() -> None:
    busy_p = [view("p0", waiting_tokens=500), view("p1", waiting_tokens=20), view("p2", waiting_tokens=900)]
    busy_d = [view("d0", sequences=3), view("d1", sequences=9), view("d2", sequences=2)]
    assert place(busy_p, busy_d, prompt_tokens=10) == Placement("p1", "d2")


def test_a_pool_that_is_nearly_full_counts_as_load() -> None:
    nodes = [view("d0", sequences=4, kv_used=0.97), view("d1", sequences=10, kv_used=0.2)]
    assert place(P, nodes, prompt_tokens=10) == Placement("p0", "d1")
    assert isinstance(place(P, [view("d0", kv_used=1.0)], prompt_tokens=10), Placement)


def test_equals_take_turns() -> None:
    taken = [place(P, D, prompt_tokens=10, turn=turn) for turn in range(4)]
    assert taken == [Placement("p0", "d0"), Placement("p1", "d1")] * 2


def test_layouts_must_match() -> None:
    assert place([view("p0", layout="b")], [view("d0"), view("d1", layout="b", sequences=9)], prompt_tokens=9) == (
        Placement(None, "d0")
    )
    assert place([view("p0", layout="b")], [view("d1", layout="b")], prompt_tokens=9) == Placement("p0", "d1")


def test_one_node_alone() -> None:
    assert place(P, D, prompt_tokens=10, last_token=True) == Placement("p0", None)
    assert place(P, D, prompt_tokens=10, local=True) == Placement(None, "d0")
    assert place([], D, prompt_tokens=10) == Placement(None, "d0")
    assert place(P, [view("d0", local_prefill_tokens=10)], prompt_tokens=10) == Placement(None, "d0")
    assert place(P, [view("d0", local_prefill_tokens=10)], prompt_tokens=11) == Placement("p0", "d0")
    assert place([view("p0", draining=True)], D, prompt_tokens=10) == Placement(None, "d0")


def test_nowhere() -> None:
    assert place(P, [], prompt_tokens=10) is Nowhere.NO_NODES
    assert place(P, [view("d0", draining=True)], prompt_tokens=10) is Nowhere.NO_NODES
    assert place(P, D, prompt_tokens=10, refused={"d0", "d1"}) is Nowhere.REFUSED
    assert place(P, D, prompt_tokens=10, refused={"p0", "p1"}) is Nowhere.REFUSED
    assert place(P, D, prompt_tokens=10, last_token=True, refused={"p0", "p1"}) is Nowhere.REFUSED


def test_a_node_that_failed_is_the_last_choice_but_a_choice() -> None:
    loaded = [view("d0", sequences=0), view("d1", sequences=50)]
    assert place(P, loaded, prompt_tokens=10, avoid={"d0": 1}) == Placement("p0", "d1")
    assert place(P, loaded[:1], prompt_tokens=10, avoid={"d0": 3, "p0": 1}) == Placement("p1", "d0")


def test_full_nodes_come_last_and_only_one_of_them_is_asked() -> None:
    full, free = view("d0", full=True), view("d1", sequences=50)
    assert place(P, [full, free], prompt_tokens=10) == Placement("p0", "d1")
    all_full = [view("d0", full=True), view("d1", full=True)]
    assert place(P, all_full, prompt_tokens=10) == Placement("p0", "d0", ask=True)
    assert place(P, all_full, prompt_tokens=10, refused={"d0"}) is Nowhere.REFUSED
    assert place(P, all_full, prompt_tokens=10, refused={"d0"}, begun=True) == Placement("p0", "d1", ask=True)
    assert place(P, [view("d0", queueing=True)], prompt_tokens=10) == Placement("p0", "d0", ask=True)


def test_pairs_that_cannot_work_get_nothing() -> None:
    unfit = {("p0", "d0"), ("p1", "d0"), ("p0", "d1")}
    busy = [view("d0"), view("d1", sequences=50)]
    for turn in range(4):
        assert place(P, busy, prompt_tokens=10, unfit=unfit, unwell={"d0"}, turn=turn) == Placement("p1", "d1")
    # where nothing else is left the decode node computes the prompt
    assert place(P, busy[:1], prompt_tokens=10, unfit=unfit, unwell={"d0"}) == Placement(None, "d0")
    assert place(P[:1], D, prompt_tokens=10, last_token=True, unwell={"p0"}) == Placement("p0", None)


def test_a_sequence_goes_where_it_fits() -> None:
    p = [view("p0", max_model_len=100), view("p1", max_model_len=400)]
    d = [view("d0", max_model_len=100), view("d1", max_model_len=300, sequences=9)]
    assert place(p, d, prompt_tokens=10, total_tokens=100) == Placement("p0", "d0")
    assert place(p, d, prompt_tokens=10, total_tokens=300) == Placement("p1", "d1")
    assert place(p, d, prompt_tokens=10, total_tokens=301) is Nowhere.NO_NODES
    assert longest([("a", 100), ("a", 400)], [("a", 100), ("a", 300)]) == 300
    assert longest([("a", 500)], [("b", 300)]) == 300 and longest([("a", 500)], []) == 500 and longest([], []) == 0


def test_another_reader_of_what_is_computed_already() -> None:
    d = [view("d0"), view("d1", layout="b"), view("d2", full=True), view("d3", draining=True)]
    assert reader(P[0], d, Terms(refused={"d0"}, begun=True)) == "d2"
    assert reader(P[0], d, Terms(refused={"d0"})) is None
    assert reader(P[0], d, Terms(refused={"d0"}, unfit={("p0", "d2")}, begun=True)) is None


views = st.builds(
    lambda layout, n, tokens, kv, draining, local: ("", layout, n, tokens, kv, draining, local),
    st.sampled_from("ab"), st.integers(0, 99), st.integers(0, 9999), st.floats(0, 1), st.booleans(), st.integers(0, 20),
)  # fmt: skip


@given(st.lists(views, max_size=4), st.lists(views, max_size=4), st.integers(1, 30), st.booleans(), st.data())
def test_always_a_legal_answer(p: list[Any], d: list[Any], tokens: int, last: bool, data: st.DataObject) -> None:
    prefill = [NodeView(f"p{i}", *v[1:]) for i, v in enumerate(p)]
    decode = [NodeView(f"d{i}", *v[1:]) for i, v in enumerate(d)]
    ids = [v.id for v in (*prefill, *decode)]
    refused = set(data.draw(st.lists(st.sampled_from(ids)))) if ids else set()
    found = place(
        prefill, decode, prompt_tokens=tokens, last_token=last, refused=refused, turn=data.draw(st.integers(0, 9))
    )
    by_id = {v.id: v for v in (*prefill, *decode)}
    open_decode = [v for v in decode if not v.draining and v.id not in refused]
    if isinstance(found, Nowhere):
        assert not any(v.draining is False and v.id not in refused and last for v in prefill)
        assert found is Nowhere.REFUSED or not [v for v in decode if not v.draining]
        return
    chosen = [by_id[id] for id in found[:2] if id is not None]
    assert chosen and not any(v.draining or v.id in refused for v in chosen)
    assert len({v.layout for v in chosen}) == 1
    assert found.decode is None or by_id[found.decode] in open_decode


# --- nodes of both roles


B = [view("b0"), view("b1")]


def test_a_node_of_both_roles_alone_computes_its_prompts() -> None:
    assert place(B[:1], B[:1], prompt_tokens=10) == Placement(None, "b0")
    assert place(B, B, prompt_tokens=10) == Placement(None, "b0")
    assert place([view("p0"), *B], B, prompt_tokens=10) == Placement(None, "b0"), "nothing has to be moved"
    assert place(B[:1], B[:1], prompt_tokens=10, last_token=True) == Placement("b0", None)


def test_of_nodes_of_both_roles_the_freer_one_computes_the_prompt() -> None:
    busy, free = view("b0", waiting_tokens=900), view("b1", sequences=3)
    assert place([busy, free], [busy, free], prompt_tokens=10) == Placement("b1", "b0")
    assert place([busy, view("p0", sequences=1)], [busy], prompt_tokens=10) == Placement("p0", "b0")
    assert place([busy, free], [busy, free], prompt_tokens=10, unfit=frozenset({("b1", "b0")})) == (
        Placement(None, "b0")
    )


def test_what_a_node_computes_for_another_is_not_sent_to_itself() -> None:
    assert reader(B[0], B, Terms()) == "b1"
    assert reader(B[0], B[:1], Terms()) is None


# --- what is cached where


def test_a_prefix_draws_its_prompt_until_computing_it_again_is_cheaper() -> None:
    for queue, expected in ((0, "p1"), (8 * CHUNK_TOKENS - 500, "p1"), (10 * CHUNK_TOKENS, "p0")):
        nodes = [view("p0"), view("p1", waiting_tokens=queue)]
        found = place(nodes, D, prompt_tokens=TOKENS, chain=PROMPT, held={"p1": 8})
        assert isinstance(found, Placement) and found.prefill == expected, queue


def test_who_has_most_keeps_it_within_a_tenth_of_the_prompt() -> None:
    # p0 would be done first, by less than a tenth of what the prompt takes
    nodes = [view("p0"), view("p1", waiting_tokens=4 * CHUNK_TOKENS + TOKENS // 20)]
    found = place(nodes, D, prompt_tokens=TOKENS, chain=PROMPT, held={"p0": 4, "p1": 8})
    assert isinstance(found, Placement) and found.prefill == "p1"


def test_what_the_transfer_takes_counts_as_tokens_that_are_not_computed_meanwhile() -> None:
    """At 10,000 tokens/s computed: 4,000 tokens take as long as 400 more over the one lane, as 8,000 over the other."""
    lanes = {"fast": 100_000.0, "slow": 5_000.0}
    target = [view("d", met=("fast", "slow"), lanes=lanes)]

    def chosen(queued: int, **more: Any) -> str | None:
        pair = [
            view("fast", waiting_tokens=queued, tokens_a_second=10_000.0),
            view("slow", tokens_a_second=10_000.0),
        ]
        found = place(pair, target, prompt_tokens=4_000, **more)
        assert isinstance(found, Placement)
        return found.prefill

    assert {queued: chosen(queued) for queued in (0, 7_500, 7_700)} == {0: "fast", 7_500: "fast", 7_700: "slow"}
    # What the target has of it does not move: half of it, and half of the difference is left.
    assert chosen(4_500, held={"d": 4}, chain=PROMPT[:7]) == "slow"
    assert chosen(3_500, held={"d": 4}, chain=PROMPT[:7]) == "fast"


def test_a_decode_node_that_has_nearly_all_of_it_is_asked_first() -> None:
    nodes = [view("d0", local_prefill_tokens=600), view("d1", local_prefill_tokens=600)]
    found = place(P, nodes, prompt_tokens=TOKENS, chain=PROMPT, held={"d1": 15})
    assert isinstance(found, Placement) and found.decode == "d1" and found.ask
    found = place(P, nodes, prompt_tokens=TOKENS, chain=PROMPT, held={"d1": 14})
    assert isinstance(found, Placement) and found.decode == "d1" and not found.ask


def test_paced_equal_prompts_still_spread() -> None:
    """Nothing is ever queued and all is cached where it went first: that node does not serve them all."""
    prefill, decode = field(sources(), [view(f"p{i}") for i in range(4)]), field(targets(), D)
    times = Counter[str]()
    for turn in range(448):
        found = place_on(prefill, decode, Terms(prompt_tokens=2048, chain=PROMPT[:4], turn=turn))
        assert isinstance(found, Placement) and found.prefill is not None
        times[found.prefill] += 1
        prefill.chosen(found.prefill)
        prefill.put(view(found.prefill))
        prefill.prefixes.stored(found.prefill, PROMPT[:4])
    assert len(times) == 4 and max(times.values()) < 448 / 2, times


# --- thousands of nodes


def many(role: str, count: int, **fields: Any) -> list[NodeView]:
    return [view(f"{role}{i}", **fields) for i in range(count)]


def test_of_many_nodes_the_least_loaded_is_found() -> None:
    p = many("p", 2000, waiting_tokens=9000, sequences=9)
    d = many("d", 2000, sequences=30)
    p[1234], d[777] = replace(p[1234], waiting_tokens=10), replace(d[777], sequences=1)
    assert place(p, d, prompt_tokens=500) == Placement("p1234", "d777")
    assert place(p, d, prompt_tokens=500, last_token=True) == Placement("p1234", None)
    found = place(p, d, prompt_tokens=500, refused={"p1234", "d777"})
    assert isinstance(found, Placement) and not {*found[:2]} & {"p1234", "d777"}
    found = place(p, d, prompt_tokens=500, unwell={"p1234"}, avoid={"d777": 1})
    assert isinstance(found, Placement) and not {*found[:2]} & {"p1234", "d777"}


def test_of_many_nodes_an_owner_and_one_that_is_connected_are_found() -> None:
    p, d = many("p", 2000), many("d", 2000, met=("p7", "p8", "p9", "p10"))
    found = place(p, d, prompt_tokens=TOKENS, chain=PROMPT, held={"p1234": 8, "d777": 3})
    assert found == Placement("p1234", "d777")
    found = place(p, d, prompt_tokens=TOKENS)
    assert isinstance(found, Placement) and found.prefill in ("p7", "p8", "p9", "p10")


def test_of_many_nodes_the_only_one_that_fits_is_found() -> None:
    p, d = many("p", 2000, max_model_len=100), many("d", 2000, max_model_len=100)
    assert place(p, d, prompt_tokens=50, total_tokens=200) is Nowhere.NO_NODES
    p[1234], d[777] = (replace(one, max_model_len=400, waiting_tokens=9000, sequences=99) for one in (p[1234], d[777]))
    assert place(p, d, prompt_tokens=50, total_tokens=200) == Placement("p1234", "d777")
    drained = [replace(one, draining=True) for one in d]
    assert place(p, drained, prompt_tokens=50, total_tokens=100) is Nowhere.NO_NODES


def test_of_many_full_nodes_one_is_asked_and_speaks_for_all() -> None:
    d = many("d", 2000, full=True)
    found = place(P, d, prompt_tokens=500)
    assert isinstance(found, Placement) and found.ask and found.decode is not None
    assert place(P, d, prompt_tokens=500, refused={found.decode}) is Nowhere.REFUSED
    assert isinstance(place(P, d, prompt_tokens=500, refused={found.decode}, begun=True), Placement)


def test_a_decision_takes_as_long_among_five_thousand_nodes_as_among_a_hundred() -> None:
    def seconds(count: int) -> float:
        p = field(sources(), [replace(one, waiting_tokens=7 * at % 999) for at, one in enumerate(many("p", count))])
        d = field(targets(), [replace(one, sequences=7 * at % 99) for at, one in enumerate(many("d", count))])
        for number in range(50):
            p.prefixes.stored(f"p{number}", PROMPT[: number % 16])
        terms = [Terms(prompt_tokens=TOKENS, chain=PROMPT, turn=turn) for turn in range(200)]
        times = []
        for _ in range(10):
            begun_s = time.process_time()
            for one in terms:
                assert isinstance(place_on(p, d, one), Placement)
            times.append(time.process_time() - begun_s)
        return min(times)

    assert seconds(5000) < 3 * seconds(100)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 99), st.booleans(), st.booleans()), max_size=120))
def test_a_field_knows_its_nodes_whatever_happened_to_them(events: list[tuple[int, int, bool, bool]]) -> None:
    made, truth = targets(), dict[str, NodeView]()
    for number, sequences, draining, leaves in events:
        one = view(f"d{number}", sequences=sequences, draining=draining, layout="ab"[number % 2])
        if leaves:
            made.drop(one.id)
            truth.pop(one.id, None)
        else:
            made.put(one)
            truth[one.id] = one
    assert {one.id: one for _, one in made.all()} == truth
    assert made.staying() == sum(not one.draining for one in truth.values())
    for layout in "ab":
        loads = [one.sequences for one in truth.values() if one.layout == layout and not one.draining]
        seen = [one.sequences for _, one in made.some(7, layout) if not one.draining]
        assert min(seen, default=None) == min(loads, default=None)


def test_the_least_of_a_thousand_is_known_whatever_changes() -> None:
    made, truth, drawn = targets(), dict[str, NodeView](), random.Random(0)
    for turn in range(4000):
        one = view(f"d{drawn.randrange(1000)}", sequences=drawn.randrange(200), full=drawn.random() < 0.1)
        if drawn.random() < 0.3:
            made.drop(one.id)
            truth.pop(one.id, None)
        else:
            made.put(one)
            truth[one.id] = one
        if turn % 20 == 0:
            seen = [(one.full, one.sequences) for _, one in made.some(turn)]
            assert min(seen, default=None) == min(((one.full, one.sequences) for one in truth.values()), default=None)
