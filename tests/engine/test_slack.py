"""The wait before a launch: as long as the device has work, and never for long beyond it."""

from __future__ import annotations

import random

import pytest

from pd_serve.engine.slack import Kind, Slack

DECODE, PROMPT = Kind.of(30, 0), Kind.of(30, 512)
LAUNCH_S = 1e-3


class Device:
    """Computes one step after the other; the loop waits as it is told, then launches and collects."""

    def __init__(self) -> None:
        self.slack = Slack()
        self.now_s = 100.0
        self.ends_s: list[float] = []  # of launched steps
        self.idle_s = 0.0
        self.waited_s = 0.0

    def step(self, kind: Kind, takes_s: float, launch_s: float = LAUNCH_S) -> None:
        wait_s = max(0.0, int(self.slack.spare_s(self.now_s, prompts=kind.prompt_tokens > 0) * 1e3) / 1e3)
        self.idle_s = self.waited_s = 0.0
        due_s, self.waited_s = self.now_s + wait_s, wait_s
        self.now_s = due_s + launch_s
        self.slack.launched(kind, due_s, self.now_s)
        begin_s = self.now_s
        if self.ends_s:
            self.idle_s = max(0.0, self.now_s - self.ends_s[-1])
            begin_s = max(self.now_s, self.ends_s[-1])
        self.ends_s.append(begin_s + takes_s)
        if len(self.ends_s) > 1:
            end_s = self.ends_s.pop(0)
            waited = end_s > self.now_s
            self.now_s = max(self.now_s, end_s)
            self.slack.collected(self.now_s, waited=waited)


def test_nothing_known_is_no_wait() -> None:
    slack = Slack()
    assert slack.spare_s(1.0, prompts=False) == 0.0
    slack.launched(DECODE, 0.9, 1.0)
    assert slack.spare_s(1.0, prompts=False) <= 0.0


def test_most_of_a_step_is_waited_and_the_device_is_never_idle() -> None:
    device, rng = Device(), random.Random(1)
    for i in range(200):
        device.step(DECODE, 7e-3 + i * 1e-6 + rng.uniform(-1e-4, 1e-4))
        if i > 5:
            assert device.idle_s == 0.0
            assert 3e-3 < device.waited_s < 6e-3  # of 7, less a launch, the margin and what is no whole millisecond


def test_steps_that_get_shorter_leave_the_device_idle_only_once_or_twice() -> None:
    device = Device()
    for _ in range(20):
        device.step(DECODE, 20e-3)
    idle = []
    for _ in range(20):
        device.step(DECODE, 5e-3)
        idle.append(device.idle_s > 0)
    assert sum(idle) <= 4, idle
    assert not any(idle[6:])


@pytest.mark.parametrize("seed", range(5))
def test_mixed_steps_leave_the_device_idle_for_a_hundredth_of_the_time(seed: int) -> None:
    device, rng, idle_s = Device(), random.Random(seed), 0.0
    start_s = device.now_s
    for _ in range(2000):
        if rng.random() < 0.2:
            device.step(PROMPT, 20e-3 + rng.uniform(-1e-3, 1e-3), 5e-3)
        else:
            device.step(DECODE, 7e-3 + rng.uniform(-3e-4, 3e-4), LAUNCH_S + rng.expovariate(5e3))
        idle_s += device.idle_s
    assert idle_s < 0.01 * (device.now_s - start_s)


def test_a_long_launch_counts_for_the_next_ones() -> None:
    device = Device()
    for _ in range(10):
        device.step(DECODE, 7e-3)
    usual_s = device.waited_s
    device.step(DECODE, 7e-3, 4e-3)
    device.step(DECODE, 7e-3)
    assert device.waited_s < usual_s
    for _ in range(10):
        device.step(DECODE, 7e-3)
    assert device.waited_s == usual_s
