"""What is announced, kept and fetched, by what vLLM's scheduler says."""

from __future__ import annotations

from typing import Any

import pytest

from pd_serve.integrations.vllm.params import held_of
from pd_serve.integrations.vllm.scheduler_side import SchedulerSide
from pd_serve.wire.link import Source
from tests.integrations.vllm.steps import TO_HAND_OVER, Status, Step, request

P = Source("p", "e", ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"))


def prefill_side(*windows: int | None) -> SchedulerSide:
    return SchedulerSide(16, windows or (None,), P)


def handed_over(prompt: int = 40) -> dict[str, Any]:
    """What a prefill server answers for a prompt that it has in its blocks."""
    side, asked = prefill_side(), request("r", prompt, TO_HAND_OVER)
    side.begun(asked)
    side.orders(Step().new("r", prompt, [1, 2, 3]))
    asked.status = Status.FINISHED_LENGTH_CAPPED
    kept, answer = side.finished(asked)
    assert kept
    assert answer is not None
    return answer


def test_a_prompt_is_announced_chunk_by_chunk_and_kept_when_it_is_finished() -> None:
    side, asked = prefill_side(), request("r", 50, TO_HAND_OVER)
    side.begun(asked)
    first = side.orders(Step().new("r", 10, [7], computed=0))  # less than a block: opened, nothing to announce
    assert (len(first.opened), first.announced) == (1, [])
    (key,) = first.opened
    second = side.orders(Step().goes_on("r", 30, [8, 9], computed=10))
    assert [(a.key, a.num_tokens, a.blocks, a.last) for a in second.announced] == [(key, 40, [(0, 0, [7, 8])], False)]
    third = side.orders(Step().goes_on("r", 10, [4], computed=40))
    assert [(a.num_tokens, a.blocks, a.last) for a in third.announced] == [(50, [(0, 2, [9, 4])], True)]
    assert not side.orders(Step().goes_on("r", 1, computed=50)).announced
    asked.status = Status.FINISHED_LENGTH_CAPPED
    kept, answer = side.finished(asked)
    assert kept
    held = held_of(answer)
    assert held is not None
    assert (held.key, held.num_tokens, held.source) == (key, 50, P)
    last = side.orders(Step())
    assert last.kept == {key: "r"}
    assert (third.computes, last.computes) == (True, False)


@pytest.mark.parametrize("status", [Status.FINISHED_STOPPED, Status.FINISHED_ABORTED])
def test_what_has_nothing_left_to_decode_is_not_kept(status: Status) -> None:
    side, asked = prefill_side(), request("r", 20, TO_HAND_OVER)
    side.begun(asked)
    (key,) = side.orders(Step().new("r", 20, [1, 2])).opened
    asked.status = status
    assert side.finished(asked) == (False, None)
    assert side.orders(Step()).cancelled == [(key, status.name.lower())]


def test_after_a_preemption_other_blocks_are_announced_under_another_key() -> None:
    side, asked = prefill_side(), request("r", 40, TO_HAND_OVER)
    side.begun(asked)
    (key,) = side.orders(Step().new("r", 32, [1, 2])).opened
    asked.status = Status.PREEMPTED
    assert side.orders(Step()).cancelled == [(key, "preempted")]
    asked.status = Status.RUNNING
    side.begun(asked)
    again = side.orders(Step().goes_on("r", 24, [5, 6, 7], computed=16, resumed=True))
    assert again.opened != [key]
    assert [(a.blocks, a.last) for a in again.announced] == [([(0, 0, [5, 6, 7])], True)]
    asked.status = Status.FINISHED_LENGTH_CAPPED
    side.finished(asked)
    assert list(side.orders(Step()).kept) == again.opened


def test_of_a_window_only_what_stays_is_announced() -> None:
    side, asked = prefill_side(None, 20), request("r", 70, TO_HAND_OVER)
    side.begun(asked)
    assert side.orders(Step().new("r", 32, [1, 2], [3, 4])).announced[0].blocks == [(0, 0, [1, 2])]
    last = side.orders(Step().goes_on("r", 38, [5, 6, 7], [8, 9, 10], computed=32)).announced[0]
    assert last.blocks == [(0, 2, [5, 6, 7]), (1, 3, [9, 10])]


def test_requests_that_nobody_else_decodes_are_left_alone() -> None:
    side, asked = prefill_side(), request("r", 40, None)
    side.begun(asked)
    orders = side.orders(Step().new("r", 40, [1, 2, 3]))
    assert side.finished(asked) == (False, None)
    assert not (orders.opened or orders.announced or side.orders(Step()).kept)


def test_exactly_what_exists_is_fetched_once() -> None:
    answer, side = handed_over(40), SchedulerSide(16, (None,))
    asked = request("d", 41, answer)  # the prompt and its first token
    assert side.matched(asked, 16) == 24
    side.allocated(asked, ([4, 5, 6],), 24)
    (fetch,) = side.orders(Step()).fetched
    assert (fetch.tables, fetch.first) == ([[4, 5, 6]], 1)
    assert side.matched(asked, 0) == 0  # after a preemption, or a failure
    side.allocated(asked, ([4, 5, 6],), 0)
    assert side.finished(asked) == (False, None)
    assert side.orders(Step()).dropped == ["d"]
    assert side.matched(request("other", 41, answer), 0) == 0  # such as the second choice of n = 2


def test_a_prompt_that_nobody_takes_is_declined() -> None:
    side = SchedulerSide(16, (None,))
    cached, aborted = request("d", 48, handed_over(48)), request("a", 20, handed_over(20))
    assert side.matched(cached, 48) == 0
    side.allocated(cached, ([1, 2, 3],), 0)
    side.finished(aborted)  # before it was scheduled
    declined = side.orders(Step()).declined
    assert [held.key for held in declined] == [cached.kv_transfer_params["pd_serve"]["key"],
                                               aborted.kv_transfer_params["pd_serve"]["key"]]  # fmt: skip


def test_a_server_that_only_computes_prompts_fetches_nothing_whoever_asks() -> None:
    side, asked = SchedulerSide(16, (None,), P, receives=False), request("d", 40, handed_over(40))
    assert side.matched(asked, 0) == 0
    side.allocated(asked, ([1, 2, 3],), 0)
    side.finished(asked)
    orders = side.orders(Step())
    assert not (orders.fetched or orders.declined or orders.dropped)


@pytest.mark.parametrize(
    "said",
    [
        None,
        5,
        {},
        {"v": 1},
        {"v": 2, "key": "k", "node_id": "n", "epoch": "e", "addresses": ["a"], "num_tokens": 4},
        {"v": 1, "key": "k", "node_id": "n", "epoch": "e", "addresses": [], "num_tokens": 4},
        {"v": 1, "key": "k", "node_id": "n", "epoch": "e", "addresses": ["a"], "num_tokens": -4},
        {"v": 1, "key": "k" * 9999, "node_id": "n", "epoch": "e", "addresses": ["a"], "num_tokens": 4},
    ],
)
def test_no_client_can_end_an_engine(said: object) -> None:
    side = SchedulerSide(16, (None,), P)
    for params in ({"do_remote_prefill": True, "pd_serve": said}, {"do_remote_prefill": "yes", "do_remote_decode": 1}):
        asked = request("d", 20, params)
        assert side.matched(asked, 0) == 0
        side.allocated(asked, ([1, 2],), 0)
        side.begun(asked)
        side.orders(Step().new("d", 20, [1, 2]))
        assert side.finished(asked) == (False, None)
