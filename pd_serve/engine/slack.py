"""How long the loop may wait before the device needs its next step: what comes until then is in that step.

With an executor of depth 1 the next step could be launched as soon as one is collected. Whatever came while a step
runs, a prompt's KV for instance, would then miss the step after it too, and wait for almost two. So the next step is
launched shortly before the running one ends. When that is, is what a step of that kind took the last time. A wait that
was too long leaves the device idle and shows when the step is collected: the next is shorter.

Used by :class:`pd_serve.engine.pipeline.Pipeline`; reads no clock.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MARGIN_S = 0.5e-3
FADING = 0.8  # of what launching took at most: a long one counts for the few after it
LATE = 0.5  # what remains of an expectation that made a launch late: two steps with less of a wait cost little


class Kind(NamedTuple):
    """Steps of a kind take about as long as each other."""

    decodes: int
    prompt_tokens: int

    @classmethod
    def of(cls, decodes: int, prompt_tokens: int) -> Kind:
        return cls(-(-decodes // 8), -(-prompt_tokens // 64))


class Slack:
    """All times in seconds, by one clock."""

    def __init__(self) -> None:
        self._took: dict[Kind, tuple[float, float]] = {}  # the last two steps of a kind
        self._running: deque[Kind] = deque()  # launched and not collected
        self._since_s = 0.0  # when the first of those began
        self._lead_s = [0.0, 0.0]  # what launching takes: without prompts, with them

    def launched(self, kind: Kind, began_s: float, now_s: float) -> None:
        """``began_s``: when the loop set about it."""
        prompts = kind.prompt_tokens > 0
        self._lead_s[prompts] = max(now_s - began_s, self._lead_s[prompts] * FADING)
        if not self._running:
            self._since_s = now_s
        self._running.append(kind)

    def collected(self, now_s: float, *, waited: bool) -> None:
        """The first of the launched steps. ``waited``: it ended just now, and not before it was asked for."""
        kind = self._running.popleft()
        took_s = now_s - self._since_s
        _, last_s = self._took.get(kind, (took_s, took_s))
        self._took[kind] = (last_s, took_s) if waited else (LATE * min(last_s, took_s),) * 2
        self._since_s = now_s

    def spare_s(self, now_s: float, *, prompts: bool) -> float:
        """How long the next launch, with ``prompts`` in it or without, can still wait; 0 or less where it is due, or
        nothing is known.
        """
        if not self._running:
            return 0.0
        ends_s = self._since_s + min(self._took.get(self._running[0], (0.0,)))
        return ends_s - self._lead_s[prompts] - MARGIN_S - now_s
