"""What peers can reach of an engine over its life: one role under each epoch, none while it sleeps.

Used by the engine's core. Owns the order of falling asleep and waking: peers lose the pool before its memory goes, and
find it under a new epoch only when everything is there again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import Protocol

from pd_serve.engine.role import NoRole, Role
from pd_serve.engine.sleep import Sleeper
from pd_serve.errors import PDServeError
from pd_serve.kv.manager import KVManager
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.wire.engine import EngineReady
from pd_serve.wire.link import Load

log = logging.getLogger(__name__)


class Roles(Protocol):
    """Makes the engine's role, each time under a new epoch over the same pool."""

    def open(self) -> Role:
        """Starts its transfer thread; ``Role.wait_ready`` waits for it."""

    def introduce(self, role: Role, load: Load, start_s: dict[str, float]) -> EngineReady:
        """Waits until the role opened last can be reached, and describes it. Raises TransferError."""


class Presence:
    """``role``: the one opened at the start, then whichever there is. ``level``: of the sleep, 0 while awake."""

    def __init__(self, roles: Roles, role: Role, kv: KVManager, sleeper: Sleeper) -> None:
        self.role = role
        self.level = 0
        self.sleeper = sleeper
        self._roles = roles
        self._kv = kv
        self._past: Counter[str] = Counter()  # what earlier roles counted

    def sleep(self, level: int) -> None:
        """Withdraws the pool from peers, forgets its contents and gives memory back.

        The caller has nothing running and nothing being pulled; leases that are left end. Raises PDServeError where a
        transfer holds on to the pool, and what the sleeper raises; ``wake`` then brings the engine back.
        """
        withdrawn = bool(self.level)
        if not withdrawn:
            withdrawn = self.role.close()
            self._past.update(self.role.counters())
            self.role = NoRole()
        self.level = max(self.level, level)
        if not withdrawn:
            raise PDServeError(
                "a transfer did not let go of the KV cache, so its memory cannot be given back: try again later, "
                "or restart the node"
            )
        self._kv.reset()
        self.sleeper.sleep(level)

    def wake(self, tags: Collection[str], load: Load) -> EngineReady | None:
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
            if not set(self.sleeper.asleep) - set(tags):
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
            self.sleeper.sleep(self.level)
            raise
        self.role.close()
        self.role = role
        self.level = 0
        return ready

    def _bring_back(self, tag: str, tags: Collection[str], start_s: dict[str, float]) -> None:
        if tag in tags and tag in self.sleeper.asleep:
            started_s = time.perf_counter()
            self.sleeper.wake([tag])
            start_s[tag] = round(time.perf_counter() - started_s, 3)

    def counters(self) -> dict[str, float]:
        """What this role and those before it have counted."""
        counted = self.role.counters()
        return {name: counted.get(name, 0.0) + self._past[name] for name in {**self._past, **counted}}

    def close(self) -> None:
        self.role.close()
