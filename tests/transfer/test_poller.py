"""The poller: descriptors as soon as they are ready, or nothing when the time is up, asleep or awake."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from pd_serve.transfer.poller import SPIN_S, Poller, look_s


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
