"""Who only fails: nodes, and pairs of nodes, that get nothing but single trials after growing pauses.

Sequences report what they met with; placement asks who is blocked. No timers: a pause ends by itself, and the
next request that is sent there is the trial.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

log = logging.getLogger(__name__)

_FAILURES = 3  # in a row, until it is blocked
_PAUSE_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # until the next trial; the last one for ever
_MANY = 1000  # entries of nodes that never came back


@dataclass
class _State:
    failures: int = 0
    trials: int = 0  # that failed
    until_s: float = 0.0
    on_trial: bool = False
    why: str = ""


class Breakers:
    """By node id, or by (prefill id, decode id). Empty while all is well."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self.states: dict[Hashable, _State] = {}  # looked at for every token: empty while all is well

    def __bool__(self) -> bool:
        return bool(self.states)

    def failed(self, key: Hashable, why: str) -> bool:
        """Whether this blocks it, for the first time or again."""
        if key not in self.states and len(self.states) >= _MANY:
            self.states.clear()
        state = self.states.setdefault(key, _State())
        state.failures += 1
        state.why = why
        if state.failures < _FAILURES or (state.failures > _FAILURES and not state.on_trial):
            return False  # what ran there already when it was blocked says nothing new
        if state.on_trial:
            state.trials += 1
        else:
            log.warning("%s failed %d times in a row (%s): single trials only", _name(key), _FAILURES, why)
        state.on_trial = False
        state.until_s = self._now_s() + _pause_s(state)
        return True

    def succeeded(self, key: Hashable) -> None:
        state = self.states.pop(key, None)
        if state is not None and state.failures >= _FAILURES:
            log.info("%s works again", _name(key))

    def tried(self, key: Hashable) -> None:
        """A request goes there: where it is a trial, no other follows until it has ended or a pause has passed."""
        state = self.states.get(key)
        if state is not None and state.failures >= _FAILURES:
            state.on_trial = True
            state.until_s = self._now_s() + _pause_s(state)

    def blocked(self, *, due: bool = False) -> dict[Hashable, str]:
        """Who gets nothing now, and why; with ``due`` also those whose next request is a trial."""
        now_s = self._now_s()
        return {
            key: f"it failed {state.failures} times in a row, the last: {state.why}"
            for key, state in self.states.items()
            if state.failures >= _FAILURES and (due or now_s < state.until_s)
        }


def _pause_s(state: _State) -> float:
    return _PAUSE_S[min(state.trials, len(_PAUSE_S) - 1)]


def _name(key: Hashable) -> str:
    return f"transfer from {key[0]} to {key[1]}" if isinstance(key, tuple) else f"node {key}"
