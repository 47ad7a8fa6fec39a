"""What an engine is over its life: one role under each epoch, asleep in between.

Used by the engine's loop, which passes on what its node orders. Owns the order of falling asleep and waking: what runs
ends, peers lose the pool before its memory goes, and find it under a new epoch only when everything is there again.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from pd_serve.compute.executor import TAGS, Executor
from pd_serve.engine.arrivals import Arrivals
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.role import Role
from pd_serve.errors import PDServeError
from pd_serve.kv.manager import KVManager
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.wire.engine import EngineReady, Listen, Sleep, SleepState, Wake
from pd_serve.wire.link import Load

log = logging.getLogger(__name__)

# An engine that is to sleep and has ended its requests waits so long for transfers that still write to its blocks.
TRANSFERS_END_S = 10.0


class Roles(Protocol):
    """Makes the engine's role, each time under a new epoch over the same pool.

    ``lets_in``: readers come in where a role is introduced.
    """

    lets_in: bool

    def open(self) -> Role:
        """Starts its transfer thread; ``Role.wait_ready`` waits for it."""

    def introduce(self, role: Role, load: Load, start_s: dict[str, float]) -> EngineReady:
        """Waits until the role opened last can be reached, and describes it. Raises TransferError."""


class Answer(NamedTuple):
    """What the node is to hear of an order. ``ready``: the engine is reached anew."""

    state: SleepState
    ready: EngineReady | None = None


class Lifecycle:
    """``role``: the one opened at the start, then whichever there is. ``level``: of the sleep, 0 while awake."""

    def __init__(
        self,
        roles: Roles,
        role: Role,
        kv: KVManager,
        executor: Executor[Any],
        pulse: Pulse,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.role = role
        self.level = 0
        self._roles = roles
        self._kv = kv
        self._executor = executor
        self._pulse = pulse
        self._arrivals = arrivals
        self._past: Counter[str] = Counter()  # what earlier roles counted
        self._order: Sleep | None = None  # waits for work to end
        self._due_s = math.inf  # when it is given up; finite once its node is in a hurry

    # --- orders

    @property
    def leaving(self) -> bool:
        """Nothing new is taken: the engine sleeps or is about to."""
        return self._order is not None or self.level > 0

    def told(self, order: Sleep) -> bool:
        """True: all that runs is to be ended at once."""
        if not order.now:
            self._order, self._due_s = order, math.inf
        elif self._order is not None and self._order.number == order.number:
            self._due_s = time.monotonic() + TRANSFERS_END_S
            return True
        return False

    def turn_in(self, load: Callable[[], Load], check_idle: Callable[[], None]) -> Answer | None:
        """Carries out an order to sleep, never while a transfer may still write to a block. Nothing runs."""
        order, role = self._order, self.role
        if order is None:
            return None
        if role.pulling or (role.leases and self._due_s == math.inf):
            if time.monotonic() <= self._due_s:
                return None
            self._order = None
            return self.answer(
                order.number,
                f"{role.pulling} transfers from other nodes have not ended within {TRANSFERS_END_S:g} s, and may still "
                "write to the KV cache: try again when those nodes answer",
            )
        if not self.level and not role.leases:
            check_idle()
        self._order = None
        try:
            with self._pulse.unbounded():
                self._sleep(order.level)
        except Exception as error:
            log.exception("the engine cannot fall asleep")
            back = self.wake(Wake(order.number, list(TAGS)), load)
            failure = "; ".join(filter(None, (_sentence(error), back.state.failure)))
            return self.answer(order.number, failure, back.ready)
        return self.answer(order.number)

    def wake(self, order: Wake, load: Callable[[], Load]) -> Answer:
        """Brings tags back, and the engine with the last of them."""
        try:
            with self._pulse.unbounded():
                ready = self._wake(order.tags, load())
        except Exception as error:
            log.exception("the engine cannot wake up")
            return self.answer(order.number, _sentence(error))
        return self.answer(order.number, ready=ready)

    def listen(self, order: Listen, load: Callable[[], Load]) -> Answer:
        """Lets readers in, from now on and after every sleep."""
        before, self._roles.lets_in = self._roles.lets_in, True
        try:
            ready = None if self.level else self._roles.introduce(self.role, load(), {})
        except PDServeError as error:
            self._roles.lets_in = before
            return self.answer(order.number, str(error))
        return self.answer(order.number, ready=ready)

    def answer(self, number: int, failure: str = "", ready: EngineReady | None = None) -> Answer:
        """To the order with this number: how the engine is now."""
        return Answer(SleepState(number, self.level, self._executor.asleep, failure), ready)

    # --- what they do

    def _sleep(self, level: int) -> None:
        """Withdraws the pool from peers, forgets its contents and gives memory back.

        Leases that are left end. Raises PDServeError where a transfer holds on to the pool, and what the executor
        raises; ``_wake`` then brings the engine back.
        """
        withdrawn = bool(self.level)
        if not withdrawn:
            withdrawn = self.role.close()
            self._past.update(self.role.counters())
            self.role = Role()
        self.level = max(self.level, level)
        if not withdrawn:
            raise PDServeError(
                "a transfer did not let go of the KV cache, so its memory cannot be given back: try again later, "
                "or restart the node"
            )
        if self._arrivals is not None:
            self._arrivals.sleep(level)
        self._kv.reset()
        self._executor.sleep(level)

    def _wake(self, tags: Collection[str], load: Load) -> EngineReady | None:
        """Brings tags back; when none is left asleep, opens a role and returns how the engine is reached now.

        Whatever it raises, the engine then sleeps as before.
        """
        if not self.level:
            return None
        start_s: dict[str, float] = {}
        role: Role | None = None
        try:
            # the pool first: the transport starts on its own thread over it while weights are loaded
            self._bring_back(KV_CACHE, tags, start_s)
            if not set(self._executor.asleep) - set(tags):
                role = self._roles.open()
            self._bring_back(WEIGHTS, tags, start_s)
            if role is None:
                return None
            started_s = time.perf_counter()
            ready = self._roles.introduce(role, load, start_s)
            start_s["transfer"] = round(time.perf_counter() - started_s, 3)
        except BaseException:
            if role is not None:
                role.close()
            self._executor.sleep(self.level)
            raise
        self.role.close()
        self.role = role
        self.level = 0
        return ready

    def _bring_back(self, tag: str, tags: Collection[str], start_s: dict[str, float]) -> None:
        if tag in tags and tag in self._executor.asleep:
            started_s = time.perf_counter()
            self._executor.wake([tag])
            start_s[tag] = round(time.perf_counter() - started_s, 3)

    def counters(self) -> dict[str, float]:
        """What this role and those before it have counted."""
        counted = self.role.counters()
        return {name: counted.get(name, 0.0) + self._past[name] for name in {**self._past, **counted}}

    def close(self) -> None:
        self.role.close()
        if self._arrivals is not None:
            self._arrivals.close()
        self._executor.close()


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, PDServeError) else f"{type(error).__name__}: {error}"
