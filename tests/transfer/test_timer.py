"""The timer wakes a poller after its time, not before, and is silent after it was cleared."""

from __future__ import annotations

import select
import time

import pytest

from pd_serve.transfer.timer import Timer


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
