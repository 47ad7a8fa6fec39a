"""Whether an engine is stopped or hangs, by what is heard of it. Owned by the node's end of its engine process.

A slow engine is not a dead one: its pulse says how long the step may take, and only silence of the pulse, or a step
beyond its limit, is trouble. A node that was itself stopped or starved blames nobody for what it did not hear.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from pd_serve.wire.link import Running

log = logging.getLogger(__name__)

# Before silence counts: what came while this process was not running is read first.
SECOND_LOOK_S = 0.2


class Clock(Protocol):
    """An event loop's timers."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> object: ...


class Liveness:
    """``trouble``: why the engine counts as stopped or hanging; ``running``: its step, by its pulse.

    ``timeout_s``: the silence after which it counts as stopped. ``read`` reads what has come, and calls ``heard``.
    """

    def __init__(self, timeout_s: float, read: Callable[[], None], now_s: Callable[[], float] = time.monotonic) -> None:
        self.trouble = ""
        self.running: Running | None = None
        self.started = False  # before that a library that loads may hold everything up
        self._timeout_s = timeout_s
        self._read = read
        self._changed: Callable[[], None] = lambda: None
        self._now_s = now_s
        self._heard_s = now_s()
        self._silent = False

    def begin(self, clock: Clock, changed: Callable[[], None]) -> None:
        """``changed`` is called when ``trouble`` begins or ends."""
        self._changed = changed
        self._watch(clock)

    def heard(self) -> None:
        self._heard_s = self._now_s()
        if self._silent:
            self._silent = False
            self._judge()

    def beat(self, running: Running | None) -> None:
        self.running = running
        self._judge()

    def _watch(self, clock: Clock) -> None:
        """Looks when the silence would be too long, and then once more; for ever."""
        due_s = self._heard_s + self._timeout_s - SECOND_LOOK_S
        now_s = self._now_s()
        if now_s < due_s:
            clock.call_later(due_s - now_s, lambda: self._watch(clock))
        else:
            clock.call_later(SECOND_LOOK_S, lambda: self._look_again(clock, now_s))

    def _look_again(self, clock: Clock, looked_s: float) -> None:
        self._read()
        now_s = self._now_s()
        if now_s - looked_s > 2 * SECOND_LOOK_S:
            # this process was stopped, or got no time: what it missed may come yet
            self._heard_s = max(self._heard_s, now_s - self._timeout_s + 2 * SECOND_LOOK_S)
        elif now_s - self._heard_s >= self._timeout_s - SECOND_LOOK_S and self.started:
            self._silent = True
            self._judge()
        if self._silent or not self.started:
            clock.call_later(self._timeout_s / 2, lambda: self._watch(clock))
        else:
            self._watch(clock)

    def _judge(self) -> None:
        running = self.running
        if self._silent:
            trouble = f"the engine has said nothing for {self._timeout_s:g} s: it is stopped, or its machine is"
        elif running is not None and running.seconds > running.limit_s:
            what = f"step {running.step} ({running.tokens} tokens)" if running.tokens else "the engine's loop"
            trouble = f"{what} takes longer than its limit of {running.limit_s:.1f} s: the engine hangs"
        else:
            trouble = ""
        if trouble != self.trouble:
            if trouble:
                log.error("%s", trouble)
            else:
                log.warning("the engine is back")
            self.trouble = trouble
            self._changed()
