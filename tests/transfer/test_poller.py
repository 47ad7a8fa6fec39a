"""The poller: descriptors as soon as they are ready, or nothing when the time is up, asleep or awake."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from pd_serve.interpreter import main_thread
from pd_serve.transfer.poller import SPIN_S, Poller, Timer, look_s


@pytest.fixture(params=[False, True], ids=["asleep", "awake"])
def poller(request: pytest.FixtureRequest) -> Iterator[Poller]:
    poller = Poller(spin=request.param)
    yield poller
    poller.close()


@pytest.mark.parametrize("delay_s", [0.0, look_s(0), SPIN_S, 0.01])
def test_nothing_when_the_time_is_up(poller: Poller, delay_s: float) -> None:
    start_s = time.monotonic()
    assert poller.wait(delay_s) == []
    assert time.monotonic() - start_s >= delay_s * 0.99


@pytest.mark.parametrize("delay_s", [0.0, SPIN_S, 30.0])
def test_what_is_ready_is_found_at_once(poller: Poller, delay_s: float) -> None:
    ours, theirs = os.pipe()
    poller.register(ours, select.EPOLLIN)
    os.write(theirs, b"x")
    assert poller.wait(delay_s) == [ours]
    poller.unregister(ours)
    assert poller.wait(0.0) == []
    os.close(ours)
    os.close(theirs)


def test_a_descriptor_ends_a_long_wait(poller: Poller) -> None:
    ours, theirs = os.pipe()
    poller.register(ours, select.EPOLLIN)
    writer = threading.Timer(0.02, os.write, (theirs, b"x"))
    writer.start()
    assert poller.wait(30.0) == [ours]
    writer.join()
    poller.modify(ours, 0)
    assert poller.wait(0.001) == []
    os.close(ours)
    os.close(theirs)


def test_beside_a_gpu_looking_again_is_not_slept() -> None:
    assert look_s(0) <= SPIN_S
    assert look_s(None) > look_s(0)


@pytest.mark.parametrize("delay_s", [1e-9, 50e-6, 0.02])
def test_it_becomes_readable_when_its_time_has_come(delay_s: float) -> None:
    timer = Timer()
    start_s = time.monotonic()
    timer.arm(delay_s)
    assert select.select([timer], [], [], 5)[0] == [timer]
    assert time.monotonic() - start_s >= delay_s
    timer.clear()
    assert select.select([timer], [], [], 0)[0] == []
    timer.clear()  # nothing is there to be read
    timer.close()


def test_arming_again_replaces_the_time() -> None:
    timer = Timer()
    timer.arm(0.001)
    timer.arm(60)
    assert select.select([timer], [], [], 0.05)[0] == []
    timer.close()


def test_nobody_spins_beside_a_main_thread_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_serve.transfer.poller.NAP_S", 0.03)
    monkeypatch.setattr(main_thread, "at_work", True)
    poller = Poller(spin=True)
    before_s = time.monotonic()
    assert poller.wait(look_s(0)) == []
    assert time.monotonic() - before_s >= 0.03
    poller.close()
