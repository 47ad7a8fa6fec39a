"""Both halves of both servers over a real transfer: what schedulers order arrives, and vLLM hears of it once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pd_serve.integrations.vllm import worker_side
from pd_serve.integrations.vllm.scheduler_side import SchedulerSide
from pd_serve.integrations.vllm.worker_side import Results, WorkerSide
from pd_serve.kv.layout import KVLayout, LayerGroup
from tests.integrations.vllm.steps import TO_HAND_OVER, Status, Step, request
from tests.transfer.harness import Clock, DecodeEnd, PrefillEnd, until

# two regions of one group of layers, whose blocks nobody here can read
FOREIGN = KVLayout(16, "float32", tuple(LayerGroup((n,), opaque_bytes=4096) for n in range(2)), "vllm TEST")
THEIRS, OURS = [5, 9, 4], [11, 3, 8]


class Server:
    def __init__(self, end: PrefillEnd | DecodeEnd, worker: WorkerSide, scheduler: SchedulerSide) -> None:
        self.end, self.worker, self.scheduler = end, worker, scheduler
        self.seen = Results()

    def step(self, plan: Step | None = None) -> None:
        """As vLLM's workers do it."""
        orders = self.scheduler.orders(plan or Step())
        self.worker.withdraw(orders)
        self.worker.begin(orders)
        if plan is not None:
            self.worker.announce(orders, lambda: True)
        new = self.worker.results()
        for name in ("sent", "received", "failed", "failed_blocks"):
            assert not getattr(self.seen, name) & getattr(new, name), "reported twice"
            getattr(self.seen, name).update(getattr(new, name))

    def until(self, name: str, value: str) -> None:
        def has() -> bool:
            self.step()
            return value in getattr(self.seen, name)

        until(has)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def p() -> Iterator[Server]:
    end = PrefillEnd(FOREIGN)
    worker = WorkerSide(end.outbox, None, (0, 0), offer_s=30.0)  # type: ignore[arg-type]
    worker._inbox = _Nothing()  # type: ignore[assignment]
    yield Server(end, worker, SchedulerSide(16, (None,), end.source))
    end.close()
    assert end.worker.internal_errors == 0


@pytest.fixture
def d(clock: Clock) -> Iterator[Server]:
    end = DecodeEnd(FOREIGN)
    worker = WorkerSide(_Nothing(), end.inbox, (0, 0), offer_s=30.0, clock=clock)  # type: ignore[arg-type]
    yield Server(end, worker, SchedulerSide(16, (None,)))
    end.close()
    assert end.worker.internal_errors == 0


class _Nothing:
    """Of a server with one role."""

    def events(self) -> list[Any]:
        return []


def computed(p: Server, prompt: int = 40) -> dict[str, Any]:
    """A prompt computed in two chunks; what the prefill server answers."""
    asked = request("p", prompt, TO_HAND_OVER)
    p.scheduler.begun(asked)
    p.step(Step().new("p", 20, THEIRS[:2]))
    p.step(Step().goes_on("p", prompt - 20, THEIRS[2:], computed=20))
    asked.status = Status.FINISHED_LENGTH_CAPPED
    kept, answer = p.scheduler.finished(asked)
    assert kept
    assert answer is not None
    p.step()
    return answer


def fetch(d: Server, answer: dict[str, Any], computed: int = 0) -> Any:
    asked = request("d", 41, answer)
    count = d.scheduler.matched(asked, computed)
    assert count == 40 - computed
    d.scheduler.allocated(asked, (OURS,), count)
    d.step()
    return asked


def test_a_prompt_arrives_where_vllm_wants_it(p: Server, d: Server) -> None:
    fetch(d, computed(p), computed=16)
    d.until("received", "d")
    p.until("sent", "p")
    assert not d.seen.failed
    for theirs, ours in zip(p.end.pool.groups, d.end.pool.groups, strict=True):
        expected = np.full_like(ours, 7)
        expected[OURS[1:]] = theirs[THEIRS[1:]]
        assert np.array_equal(ours, expected)


def test_a_step_that_computes_nothing_rests_until_something_has_arrived(
    p: Server, d: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_side, "IDLE_WAIT_S", 10.0)
    fetch(d, computed(p))
    d.worker.rest(computes=False)
    assert d.worker.results().received == {"d"}


def test_a_step_that_computes_waits_for_what_comes_meanwhile_and_not_for_more(
    p: Server, d: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_side, "IDLE_WAIT_S", 10.0)
    rate: dict[str, float] = {}
    monkeypatch.setattr(d.end.inbox, "lanes", lambda: rate)
    answer = computed(p)
    answer["pd_serve"]["key"], held = "another", answer["pd_serve"]["key"]
    fetch(d, answer)
    until(lambda: p.end.outbox.counters()["handshakes"] == 1)
    begun_s = time.monotonic()
    d.worker.rest(computes=True)  # nobody knows how fast it comes
    rate[p.end.source.node_id] = 1.0
    d.worker.rest(computes=True)  # not soon enough
    rate[p.end.source.node_id] = 1e6
    clock.now_s += 11.0
    d.worker.rest(computes=True)  # the steps before have waited
    assert time.monotonic() - begun_s < 5.0
    answer["pd_serve"]["key"] = held
    both = [answer, computed(p)]
    for name, one in zip("ef", both, strict=True):
        asked = request(name, 41, one)
        d.scheduler.allocated(asked, (OURS,), d.scheduler.matched(asked, 0))
    d.worker.begin(d.scheduler.orders(Step()))
    d.worker.rest(computes=True)
    assert d.worker.results().received == {"e", "f"}


def test_a_prefill_server_that_has_forgotten_is_waited_for_and_then_not(p: Server, d: Server, clock: Clock) -> None:
    answer = computed(p)
    answer["pd_serve"]["key"] = "another"
    fetch(d, answer)
    until(lambda: p.end.outbox.counters()["handshakes"] == 1)
    d.step()
    assert not d.seen.received
    clock.now_s += 31.0
    d.until("received", "d")
    assert (d.seen.failed, d.seen.failed_blocks) == ({"d"}, set(OURS))


def test_params_that_say_more_than_was_kept_are_a_failure(p: Server, d: Server) -> None:
    answer = computed(p)
    answer["pd_serve"]["num_tokens"] = 48
    asked = request("d", 49, answer)
    d.scheduler.allocated(asked, (OURS,), d.scheduler.matched(asked, 0))
    d.step()
    d.until("failed", "d")
    p.until("sent", "p")


def test_a_lease_that_has_ended_is_a_failure(p: Server, d: Server) -> None:
    answer = computed(p)
    p.end.outbox.cancel(answer["pd_serve"]["key"], "expired")
    fetch(d, answer)
    d.until("failed", "d")
    assert d.seen.received == {"d"}


def test_whoever_is_aborted_is_received_and_its_blocks_are_free_on_both_sides(p: Server, d: Server) -> None:
    asked = fetch(d, computed(p))
    asked.status = Status.FINISHED_ABORTED
    d.scheduler.finished(asked)
    d.until("received", "d")
    assert not d.seen.failed
    p.until("sent", "p")


def test_declined_prompts_are_free_at_once(p: Server, d: Server) -> None:
    asked = request("d", 41, computed(p))
    asked.status = Status.FINISHED_ABORTED
    d.scheduler.finished(asked)
    d.step()
    p.until("sent", "p")
    assert not d.seen.received
