"""When an engine counts as stopped or hanging, with simulated time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pd_serve.node.liveness import Liveness
from pd_serve.wire.link import Running
from tests.router.test_stream import ManualClock

TIMEOUT_S = 5.0


class Engine:
    """Beats as the test says; what it said while the node slept is read late."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.unread = 0
        self.troubles: list[str] = []
        self.liveness = Liveness(TIMEOUT_S, self.read, self.clock.now_s)
        self.liveness.started = True
        self.liveness.begin(self.clock, self.changed)

    def read(self) -> None:
        while self.unread:
            self.unread -= 1
            self.liveness.heard()

    def changed(self) -> None:
        self.troubles.append(self.liveness.trouble)

    def lives(self, seconds: int, each: Callable[[], None] | None = None) -> None:
        for _ in range(seconds):
            self.liveness.heard()
            if each is not None:
                each()
            self.clock.advance(1.0)


def test_silence_is_trouble_once_and_ends_with_a_word() -> None:
    engine = Engine()
    engine.lives(60)
    assert not engine.troubles
    engine.clock.advance(TIMEOUT_S + 1.0)
    assert len(engine.troubles) == 1 and "said nothing for 5 s" in engine.liveness.trouble
    engine.clock.advance(60.0)
    assert len(engine.troubles) == 1
    engine.lives(1)
    assert engine.troubles[1:] == [""]
    engine.clock.advance(TIMEOUT_S + 1.0)
    assert len(engine.troubles) == 3, "it is watched as before"


def test_an_engine_that_starts_may_be_silent_for_long() -> None:
    engine = Engine()
    engine.liveness.started = False
    engine.clock.advance(600.0)
    assert not engine.troubles
    engine.lives(1)
    engine.liveness.started = True
    engine.clock.advance(2 * TIMEOUT_S)
    assert len(engine.troubles) == 1


@pytest.mark.parametrize("stopped_s", [6.0, 600.0])
def test_a_node_that_was_stopped_reads_first_and_blames_nobody(stopped_s: float) -> None:
    engine = Engine()
    engine.lives(3)
    engine.clock.sleep(stopped_s)
    engine.unread = 3
    engine.clock.advance(0.5)
    assert not engine.troubles and not engine.unread
    engine.clock.advance(TIMEOUT_S + 1.0)
    assert len(engine.troubles) == 1, "from then on it counts again"


def test_a_node_that_was_starved_gives_the_engine_another_moment() -> None:
    engine = Engine()
    engine.clock.advance(TIMEOUT_S - 0.1)  # the first look, at what is nearly too long
    engine.clock.sleep(3.0)  # and the second comes far too late
    engine.clock.advance(0.1)
    assert not engine.troubles
    engine.clock.advance(1.0)
    assert len(engine.troubles) == 1


def test_a_step_beyond_its_limit_hangs_until_it_ends() -> None:
    engine = Engine()
    beat = engine.liveness.beat
    engine.lives(3, lambda: beat(Running(7, 100, 9.0, 10.0)))
    assert not engine.troubles
    engine.lives(3, lambda: beat(Running(7, 100, 11.0, 10.0)))
    assert engine.troubles == ["step 7 (100 tokens) takes longer than its limit of 10.0 s: the engine hangs"]
    engine.clock.advance(TIMEOUT_S + 1.0)
    assert "said nothing" in engine.troubles[-1], "a stopped process is stuck for another reason"
    engine.lives(1)
    assert "hangs" in engine.troubles[-1]
    engine.lives(1, lambda: beat(None))
    assert engine.troubles[-1] == "" and engine.liveness.running is None
    engine.lives(1, lambda: beat(Running(8, 0, 11.0, 10.0)))
    assert engine.liveness.trouble.startswith("the engine's loop takes longer")
