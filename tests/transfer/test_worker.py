"""The transfer thread: calls and faults. What it does with sockets and lanes is seen in tests of inbox and outbox."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from pd_serve.errors import TransferError
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.transfer import worker as module
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.worker import TransferWorker
from tests.transfer.harness import until
from tests.transfer.scripted import copy_lanes

MEMORY = PoolMemory(None, (Region(4096, PROBE_BLOCK_BYTES, PROBE_BLOCKS),))


class Service:
    """Fails in the turns that it is told to fail in."""

    def __init__(self) -> None:
        self.turns = 0
        self.fails: range = range(0)
        self.stopped = False
        self.told: Mailbox[None] = Mailbox()

    def start(self) -> None:
        pass

    def run_due(self, now_s: float) -> float:
        self.turns += 1
        if self.turns in self.fails:
            raise RuntimeError("a mistake of ours")
        return 0.01

    def stop(self) -> bool:
        self.stopped = True
        return True

    def gave_up(self) -> None:
        assert self.stopped
        self.told.wake()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def worker(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[TransferWorker]:
    monkeypatch.setattr(module, "FAULT_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "GIVE_UP_S", 0.3)
    made = TransferWorker(copy_lanes(MEMORY))
    made.add(service)
    made.start()
    made.wait_ready()
    yield made
    made.close()


def test_turns_that_fail_now_and_then_end_nothing(service: Service, worker: TransferWorker) -> None:
    for _ in range(3):
        begin = service.turns + 2
        service.fails = range(begin, begin + 5)
        until(lambda begin=begin: service.turns > begin + 10)  # type: ignore[misc]
    worker.check()
    assert worker.internal_errors == 15
    assert not service.stopped


def test_a_call_that_fails_ends_nothing(service: Service, worker: TransferWorker) -> None:
    ran: list[int] = []
    worker.call(lambda: 1 // 0)
    worker.call(ran.append, 1)
    until(lambda: ran)
    assert worker.internal_errors == 1
    worker.check()


def test_where_every_turn_fails_the_thread_ends_and_says_so(
    service: Service, worker: TransferWorker, caplog: pytest.LogCaptureFixture
) -> None:
    service.fails = range(1 << 60)
    assert select.select([service.told.fileno()], [], [], 10)[0], "the main thread is not told"
    with pytest.raises(TransferError, match=r"failed for 0.3 s in every turn \(RuntimeError\('a mistake of ours'\)\)"):
        worker.check()
    assert 3 <= worker.internal_errors < 100
    assert sum(record.exc_info is not None and bool(record.exc_info) for record in caplog.records) == 1, (
        "once is enough"
    )
    assert service.stopped
    assert not worker.lanes.transports, "lanes are still open"
    assert worker.close(), "nothing uses the pool"
