"""The engine's loop from its node's side: who is taken, what a bad request does to others, and what the pulse says."""

from __future__ import annotations

import time
from array import array
from contextlib import closing
from pathlib import Path

import pytest

from pd_serve.wire import engine as wire
from pd_serve.wire import link
from tests.engine.harness import VOCAB, DeviceExecutor, Node

PARAMS = link.SamplingParams(max_tokens=4, seed=0, temperature=0)


def tokens(count: int = 20) -> bytes:
    return array("i", range(2, 2 + count)).tobytes()


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: float("nan")}},
        {"stop_token_ids": (VOCAB,)},
        {"allowed_token_ids": (3, VOCAB)},
        {"bad_words": ((3,), (4, -1))},
        {"bad_words": ((),)},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 1e300},
        {"frequency_penalty": float("-inf")},
        {"min_tokens": -1},
        {"logprobs": VOCAB + 1},
        {"prompt_logprobs": -2},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling_values_that_cannot_be_are_refused_at_the_door(node: Node, sampling: dict[str, object]) -> None:
    node.submit("bad", 4, **sampling)
    failure = node.output("bad").failure
    assert failure is not None and failure.kind == "invalid"
    assert next(iter(sampling)) in failure.message


def test_garbage_for_a_source_an_age_or_peers_is_refused_in_words(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("", "tcp://", "tcp://[::", "tcp://host:99999999", "http://host:1"):
        node.say(link.Submit(f"to {address}", tokens(), 0, PARAMS, source=link.Source("p", "e", (address,))))
        failure = node.output(f"to {address}").failure
        assert failure is not None and failure.kind == "invalid"
        node.say(link.Peers([link.Source("p", "e", (address,))]))
    for age_s in (-1.0, float("nan"), float("inf")):
        node.say(link.Submit(f"aged {age_s}", tokens(), 0, PARAMS, age_s=age_s))
        failure = node.output(f"aged {age_s}").failure
        assert failure is not None and failure.kind == "invalid"
    node.submit("good", 3)
    node.finished("good")
    assert not any(record.exc_info for record in caplog.records)


def test_one_sequence_that_cannot_be_computed_fails_alone(node: Node) -> None:
    node.executor.poison = 50
    node.executor.go.clear()
    node.submit("first", 3)
    node.say(link.Submit("poisoned", array("i", [50, 51, 52]).tobytes(), 0, PARAMS))
    for name, prompt in (("a", 12), ("b", 16), ("c", 24)):
        node.submit(name, 5, prompt)
    node.executor.go.set()
    for name in ("first", "a", "b", "c"):
        node.finished(name)
    failure = node.output("poisoned").failure
    assert failure is not None and failure.kind == "internal"
    assert [o.id for o in node.outputs if o.failure] == ["poisoned"]
    assert [t for o in node.outputs if o.id == "b" for t in o.tokens] == [7] * 5
    node.kv.check()


def test_a_report_names_the_last_submit_of_each_link_that_it_includes(node: Node) -> None:
    def submits() -> dict[int, int]:
        return next((m.submits for m in reversed(node.heard) if isinstance(m, wire.Report)), {})

    node.submit("a", 2, number=1)
    node.submit("bad", 2, number=2, temperature=-1.0)
    node.say(link.Submit("other", tokens(), 0, PARAMS, number=7), origin=2)
    node.listen(lambda: submits() == {1: 2, 2: 7}, "both links' numbers")
    node.tell(wire.Drop(2))
    node.listen(lambda: submits() == {1: 2}, "nothing of a link that is gone")


def test_an_answer_does_not_wait_for_the_next_step(node: Node) -> None:
    node.submit("long", 50)
    node.listen(lambda: node.outputs, "tokens")
    node.executor.step_s = 0.1
    node.submit("bad", 2, temperature=-1.0)
    assert node.output("bad").failure is not None
    assert node.outputs[-1].id == "bad"  # by itself, not with the tokens of a step after it


def test_what_comes_while_a_step_runs_is_in_the_next_one(tmp_path: Path) -> None:
    """With an executor that is a step ahead: the next step is launched when the running one is about to end."""
    with closing(Node(f"ipc://{tmp_path}/ahead", DeviceExecutor)) as node:
        node.executor.step_s = 0.1
        node.submit("a", 30)
        node.listen(lambda: len(node.outputs) == 8, "some steps")
        node.submit("b", 2)  # the step after the one of the eighth token has begun
        node.output("b")
        assert [output.id for output in node.outputs[8:]].index("b") <= 2
        node.finished("b")


def test_the_pulse_goes_on_during_a_step_and_says_how_long_it_may_take(node: Node) -> None:
    while (beat := node.beat()).running is not None:
        pass  # the loop's first turn
    node.executor.go.clear()
    node.submit("a", 3)
    while (beat := node.beat()).running is None or not beat.running.tokens:
        pass
    first = beat.running
    assert (first.step, first.tokens) == (1, 20)
    assert first.limit_s == pytest.approx(2.0)  # nothing was measured: ten times the least
    while (beat := node.beat()).running is not None and beat.running.seconds < 0.3:
        assert beat.running.step == 1
    assert beat.running is not None
    node.executor.go.set()
    node.finished("a")
    node.executor.go.clear()
    node.submit("b", 3, 60)  # 40 more tokens; 20 took 0.3 s before
    while (beat := node.beat()).running is None or beat.running.step < 4:
        pass
    assert beat.running.limit_s > 1.0  # ten times what was measured, which is more than the least


def test_a_wait_without_work_is_no_step(node: Node) -> None:
    time.sleep(0.3)
    beats = [node.beat() for _ in range(5)]
    assert beats[-1].running is None


def test_what_is_urgent_overtakes_what_waits(node: Node) -> None:
    def submit(name: str, start: int, priority: int = 0) -> None:
        data = array("i", range(start, start + 20)).tobytes()  # nobody waits for another one's prefix
        node.say(link.Submit(name, data, 0, PARAMS, priority=priority))

    node.executor.go.clear()
    names = [f"usual{number}" for number in range(8)]
    for number, name in enumerate(names):
        submit(name, 2 + number)
    submit("later", 20, priority=5)
    submit("urgent", 30, priority=-1)
    time.sleep(0.3)  # all have come when the first step ends
    node.executor.go.set()
    node.finished("later")
    first = list(dict.fromkeys(o.id for o in node.outputs if o.tokens))
    assert first[-1] == "later"
    assert first.index("urgent") < first.index("usual4")  # a step takes three of these prompts and begins a fourth
    assert [name for name in first if name in names] == names
