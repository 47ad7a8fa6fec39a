"""Steps on their way through the executor: launched in order, collected in order, and mended when one fails.

Called by the engine's loop, which books what comes out before it asks for more. With an executor of depth 1 the next
step is launched before the one before is collected, shortly before that ends (:mod:`pd_serve.engine.slack`). A step
that fails is computed again in halves, so that only those sequences fail that cannot be computed; what was launched
after it is dropped and planned anew.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from pd_serve.compute.executor import Executor
from pd_serve.compute.step import Sampled
from pd_serve.engine.plan import StepBuilder, Work
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.scheduler import Scheduler
from pd_serve.engine.sequence import State
from pd_serve.engine.slack import Kind, Slack
from pd_serve.interpreter import main_thread

log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """What came of a step, or of a part of one."""

    works: list[Work]
    sampled: Sampled | None  # None: nothing, its one sequence cannot be computed


class Pipeline:
    def __init__(self, executor: Executor[Any], builder: StepBuilder, scheduler: Scheduler, pulse: Pulse) -> None:
        self._executor = executor
        self._builder = builder
        self._scheduler = scheduler
        self._pulse = pulse
        self._launched: deque[tuple[list[Work], Any]] = deque()
        self._slack = Slack()
        self._due_s: float | None = None  # since when the next launch is due
        self.num_failures = 0
        self.busy_s = 0.0  # how long steps were computed that are collected
        self._since_s = 0.0  # when the first of those in flight began

    @property
    def launched(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._launched)

    def spare_ms(self) -> int:
        """For how long nothing needs to be launched or collected; 0: now is the time."""
        now_s = time.monotonic()
        spare_ms = int(self._slack.spare_s(now_s, prompts=self._scheduler.has_prompts) * 1e3)
        if spare_ms <= 0 and self._due_s is None:
            self._due_s = now_s
        return max(0, spare_ms)

    def turn(self, plan: list[Work]) -> Iterator[Collected]:
        """Launches a plan and collects the step before it, or where it computes at once this one."""
        try:
            if plan:
                self._launch(plan)
            self._due_s = None
        except Exception:
            self._due_s = None
            yield from self.collect()
            yield from self._compute_apart(plan)
        else:
            while len(self._launched) > (self._executor.depth if plan else 0):
                yield from self._collect()

    def collect(self) -> Iterator[Collected]:
        """Collects all that is in flight."""
        while self._launched:
            yield from self._collect()

    def _launch(self, works: list[Work]) -> None:
        now_s = time.monotonic()
        began_s = now_s if self._due_s is None else self._due_s
        if not self._launched:
            self._since_s = now_s
        with self._busy(works, self._executor.depth == 0):
            self._launched.append((works, self._executor.launch(self._builder.build(works))))
        if self._executor.depth:
            self._slack.launched(Kind.of(*_tokens(works)), began_s, time.monotonic())

    def _collect(self, *, again: bool = False) -> Iterator[Collected]:
        works, launched = self._launched.popleft()
        waited = not self._executor.done(launched)
        try:
            with self._busy(works, self._executor.depth > 0):
                main_thread.at_work = not waited
                sampled = self._executor.collect(launched)
                main_thread.at_work = True
        except Exception:
            self._slack = Slack()
            self._drop()
            yield from self._compute_apart(works, again=again)
        else:
            now_s = time.monotonic()
            self.busy_s += now_s - self._since_s
            self._since_s = now_s
            if self._executor.depth:
                self._slack.collected(now_s, waited=waited)
            yield Collected(works, sampled)

    def _busy(self, works: list[Work], computes: bool) -> AbstractContextManager[None]:
        """The pulse counts the time in which the device computes: in launching or in collecting."""
        return self._pulse.step(sum(work.num_tokens for work in works)) if computes else nullcontext()

    def _drop(self) -> None:
        """Of what was launched after a step that failed, nothing counts."""
        while self._launched:
            works, launched = self._launched.popleft()
            try:
                self._executor.collect(launched)
            except Exception as error:
                log.debug("so did the step after it: %r", error)
            self._builder.forget(works)
            for work in works:
                self._scheduler.failed(work)

    def _compute_apart(self, works: list[Work], *, again: bool = False) -> Iterator[Collected]:
        """Within the handling of the exception that ``works`` ended with. Nothing is in flight."""
        self.num_failures += 1
        self._builder.forget(works)
        alive = [work for work in works if work.seq.state is State.RUNNING]
        for work in works:
            if work.seq.state is not State.RUNNING or len(works) == 1:
                self._scheduler.failed(work)
        if len(works) == 1:
            log.error("%s cannot be computed and ends here", works[0].seq.id, exc_info=True)
            if alive:
                yield Collected(works, None)
            return
        log.warning("a step of %d sequences failed; they are computed apart", len(works), exc_info=not again)
        half = (len(alive) + 1) // 2
        for part in filter(None, (alive[:half], alive[half:])):
            try:
                self._launch(part)
            except Exception:
                yield from self._compute_apart(part, again=True)
            else:
                yield from self._collect(again=True)


def _tokens(works: list[Work]) -> tuple[int, int]:
    """Of sequences that decode, and of prompts."""
    decodes = sum(work.num_tokens == 1 for work in works)
    return decodes, sum(work.num_tokens for work in works) - decodes
