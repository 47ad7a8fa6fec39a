"""The scheduler with a real KV manager; a plain function stands for the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.engine.plan import StepBuilder, Work
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.layout import KVLayout, LayerGroup, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.wire.link import SamplingParams

BLOCK = 4
FULL = kv_group((0,), num_kv_heads=1, head_dim=8)
WINDOW = kv_group((1,), num_kv_heads=1, head_dim=8, window=7)


def scheduler(
    blocks: int = 64,
    *,
    budget: int = 16,
    saturating: int = 10_000,
    seqs: int = 8,
    groups: tuple[LayerGroup, ...] = (FULL,),
) -> Scheduler:
    kv = KVManager(KVLayout(BLOCK, "float32", groups), (blocks,) * len(groups), 256)
    limits = Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        saturating_tokens=saturating,
        max_queue=100,
        max_queue_wait_s=10.0,
        max_model_len=255,
    )
    return Scheduler(kv, limits)


def sequence(id: str, tokens: list[int], max_tokens: int = 4, arrival_s: float = 0.0) -> Sequence:
    array = np.array(tokens, dtype=np.int32)
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return Sequence(id, 1, array, len(tokens), params, capacity=256, arrival_s=arrival_s)


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 1000


def planned(s: Scheduler) -> list[Work]:
    plan = s.plan()
    assert plan is not None  # nothing is in flight
    return plan


def step(s: Scheduler) -> list[Work]:
    """One engine step; finished sequences leave."""
    plan = planned(s)
    for work in plan:
        assert s.collected(work)
        if work.samples:
            seq = work.seq
            seq.append(next_token(seq.tokens.tolist()))
            if seq.output_index >= seq.sampling.max_tokens:
                s.remove(seq)
    return plan


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    s = scheduler()
    short, long = sequence("a", [1, 2, 3], 8), sequence("b", list(range(40)), 2)
    s.add(short)
    step(s)
    s.add(long)
    plan = planned(s)
    assert [(w.seq.id, w.num_tokens) for w in plan] == [("a", 1), ("b", 15)]


def test_two_prompts_share_a_step_under_the_budget() -> None:
    s = scheduler(budget=16)
    s.add(sequence("a", list(range(10))))
    s.add(sequence("b", list(range(100, 110))))
    assert [(w.seq.id, w.num_tokens) for w in planned(s)] == [("a", 10), ("b", 6)]


def test_a_prompt_that_saturates_the_device_has_the_step_for_itself() -> None:
    s = scheduler(budget=64, saturating=20)
    for id, length in (("a", 30), ("b", 8), ("c", 8), ("d", 30)):
        s.add(sequence(id, [ord(id)] * length))
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 30)]
    # a step with a decode is filled up to what saturates
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 8), ("c", 8), ("d", 3)]
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 1), ("c", 1), ("d", 17)]
    s.add(sequence("e", [1] * 30))
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 1), ("c", 1), ("d", 10), ("e", 7)]


def test_the_last_few_tokens_of_a_prompt_have_no_step_of_their_own() -> None:
    s = scheduler(budget=64, saturating=20)
    s.add(sequence("a", [1] * 30, 40))
    step(s)
    for id, length in (("b", 24), ("c", 24), ("d", 25)):
        s.add(sequence(id, [ord(id)] * length))
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 24)]
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 1), ("c", 18)]
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 1), ("c", 6), ("d", 12)]
    assert [(w.seq.id, w.num_tokens) for w in step(s)] == [("a", 1), ("b", 1), ("c", 1), ("d", 13)]


def test_prompts_go_on_beside_decodes_that_saturate_the_device() -> None:
    s = scheduler(budget=64, saturating=8, seqs=16)
    for id in "abcdefghi":
        s.add(sequence(id, [ord(id)] * 2, 40))
    while s.waiting or any(seq.num_computed < 2 for seq in s.running):
        step(s)
    s.add(sequence("z", [1] * 30))
    assert [w.num_tokens for w in step(s)] == [1] * 9 + [2]


def test_equal_prompts_are_computed_once() -> None:
    s = scheduler(budget=64)
    prompt = list(range(33))
    for id in "abcd":
        s.add(sequence(id, prompt))
    first, second = step(s), step(s)
    assert [(w.seq.id, w.num_tokens) for w in first] == [("a", 33)]
    assert sorted((w.seq.id, w.num_tokens) for w in second) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def test_admission_waits_for_room_for_the_whole_prompt() -> None:
    s = scheduler(blocks=9)  # 8 usable
    s.add(sequence("a", list(range(20))))
    s.add(sequence("b", list(range(50, 70))))
    assert [w.seq.id for w in planned(s)] == ["a"]
    while s.running:
        step(s)
    assert [w.seq.id for w in planned(s)] == ["b"]


def test_when_blocks_run_out_the_youngest_is_computed_again() -> None:
    s = scheduler(blocks=10, budget=64)
    a, b = sequence("a", list(range(14)), 16), sequence("b", list(range(50, 64)), 16)
    s.add(a)
    s.add(b)
    while s.running or s.waiting:
        step(s)
    assert s.num_preemptions > 0
    assert a.tokens.tolist() == expected(list(range(14)), 16)
    assert b.tokens.tolist() == expected(list(range(50, 64)), 16)
    s.kv.check(idle=True)


def test_a_full_queue_refuses_with_a_hint() -> None:
    s = scheduler()
    for i in range(100):
        s.add(sequence(str(i), [1]))
    failure = s.refuses(len(s.waiting))
    assert failure is not None
    assert failure.kind == "refused" and failure.retry_after_s > 0


def test_a_stream_that_has_begun_is_never_refused() -> None:
    s = scheduler()
    assert s.refuses(1000) is not None
    assert s.refuses(1000, begun=True) is None


def test_who_would_wait_too_long_is_refused_with_the_wait_as_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("pd_serve.engine.scheduler.time.monotonic", lambda: clock[0])
    s = scheduler(blocks=9)
    for i in range(8):
        s.add(sequence(str(i), [i] * 20, 2))
    assert s.refuses(8) is None  # nothing is known yet
    while s.waiting:
        clock[0] += 1.0  # three steps, so three seconds a sequence
        step(s)
    failure = s.refuses(8)
    assert failure is not None and failure.kind == "refused"
    assert 20 < failure.retry_after_s < 26
    assert s.refuses(3) is None
    assert s.refuses(0) is None
    clock[0] += 1000.0
    assert s.refuses(8) is None  # that was long ago


def test_the_oldest_request_is_first_and_nobody_overtakes_it_for_being_small() -> None:
    s = scheduler(blocks=9, budget=64)  # 8 usable
    s.add(sequence("running", list(range(20)), 8, arrival_s=5.0))
    step(s)
    s.add(sequence("small", [1, 2, 3], 2, arrival_s=9.0))
    s.add(sequence("large", list(range(50, 70)), 2, arrival_s=7.0))
    s.add(sequence("resumed", list(range(70, 74)), 2, arrival_s=1.0))
    assert [q.id for q in s.waiting] == ["resumed", "large", "small"]
    assert [w.seq.id for w in step(s)] == ["running", "resumed"]
    assert [q.id for q in s.waiting] == ["large", "small"]
    order = []
    while s.running or s.waiting:
        order += [w.seq.id for w in step(s) if w.seq.id not in order]
    assert order.index("large") < order.index("small")


def test_who_is_younger_than_one_that_waits_elsewhere_for_room_waits_too() -> None:
    s = scheduler()
    s.outside_s = 5.0
    s.add(sequence("old", [1, 2, 3], arrival_s=4.0))
    s.add(sequence("young", [4, 5, 6], arrival_s=6.0))
    assert [w.seq.id for w in step(s)] == ["old"]
    s.outside_s = float("inf")
    assert [w.seq.id for w in step(s)] == ["old", "young"]


def test_the_youngest_request_is_preempted_and_keeps_its_age() -> None:
    s = scheduler(blocks=10, budget=64)
    young = sequence("young", list(range(14)), 16, arrival_s=9.0)
    old = sequence("old", list(range(50, 64)), 16, arrival_s=2.0)
    s.add(young)
    step(s)
    s.add(old)  # joins later: its first nodes were lost
    while not s.num_preemptions:
        step(s)
    assert young.state is State.WAITING and old.state is State.RUNNING
    s.add(sequence("between", [1, 2, 3], arrival_s=5.0))
    assert [q.id for q in s.waiting] == ["between", "young"]


def test_arrays_of_a_mixed_step() -> None:
    s = scheduler(groups=(FULL, WINDOW))
    s.add(sequence("a", [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], 8))
    step(s)
    s.add(sequence("b", [1, 2, 3]))
    plan = planned(s)
    found = StepBuilder(BLOCK, 2, ()).build(plan)
    a, b = plan[0].seq, plan[1].seq
    assert found.num_decode == 1
    assert found.tokens.tolist() == [int(a.tokens[-1]), 1, 2, 3]
    assert found.positions.tolist() == [10, 0, 1, 2]
    assert found.query_start.tolist() == [0, 1, 4]
    assert found.seq_lens.tolist() == [11, 3]
    assert found.logits_rows.tolist() == [0, 3]
    assert a.blocks is not None and b.blocks is not None
    assert found.slots[0].tolist() == [
        int(a.blocks.tables[0][2]) * BLOCK + 2,
        *(int(b.blocks.tables[0][0]) * BLOCK + i for i in range(3)),
    ]
    # position 10 sees 4 to 10, and the window is laid before the last whole block: block 0 is still held
    assert found.block_tables[1][0].tolist() == a.blocks.tables[1][:3].tolist()


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12)), min_size=1, max_size=8
    ),
    blocks=st.integers(15, 40),
    budget=st.integers(2, 64),
    saturating=st.integers(1, 64),
    windowed=st.booleans(),
    aborts=st.sets(st.integers(0, 30)),
)
def test_whatever_the_order_every_text_is_its_own(
    prompts: list[tuple[list[int], int]], blocks: int, budget: int, saturating: int, windowed: bool, aborts: set[int]
) -> None:
    s = scheduler(blocks, budget=budget, saturating=saturating, seqs=4, groups=(FULL, WINDOW) if windowed else (FULL,))
    seqs = [sequence(str(i), tokens, count) for i, (tokens, count) in enumerate(prompts)]
    for seq in seqs:
        s.add(seq)
    aborted = set()
    for i in range(3000):
        if not (s.running or s.waiting):
            break
        plan = step(s)
        assert sum(w.num_tokens for w in plan) <= max(budget, len(plan))
        s.kv.check()
        if i in aborts and s.running:
            aborted.add(s.running[0].id)
            s.remove(s.running[0])
    assert not s.running and not s.waiting
    for seq, (tokens, count) in zip(seqs, prompts, strict=True):
        assert seq.state is State.FINISHED
        if seq.id not in aborted:
            assert seq.tokens.tolist() == expected(tokens, count)
    s.kv.check(idle=True)
