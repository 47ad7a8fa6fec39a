"""The node's sleep: what operators order, carried out one order at a time, and what routers see of it meanwhile.

Called by the HTTP application. A node that is to sleep first drains: routers hear of it and send nothing new. What
still runs after ``timeout_s`` is taken from it by ending the links, so that routers go on with it elsewhere. A node
that sleeps is known to no router; it comes back as a new one does, under the epoch that its engine has then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import msgspec

from pd_serve.errors import PDServeError
from pd_serve.node.engine_process import EngineProcess
from pd_serve.wire.engine import SleepState

log = logging.getLogger(__name__)

LEVELS = (1, 2)
TAGS = ("weights", "kv_cache")


class State(Enum):
    AWAKE = "awake"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Routers(Protocol):
    """What routers know of this node."""

    def drain(self) -> None:
        """Tells them to send nothing new."""

    async def leave(self) -> None:
        """Takes the registration back and ends all links. Idempotent."""

    def join(self) -> None:
        """Registers the node again. After ``leave``."""


class Refused(PDServeError):
    """An order that was not carried out. ``status``: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Document(msgspec.Struct):
    """The answer to every question about sleep."""

    is_sleeping: bool
    state: str
    level: int  # 0: awake
    asleep: list[str]  # tags


class Sleep:
    """``timeout_s``: how long running requests and leases may take to end."""

    def __init__(self, engine: EngineProcess, routers: Routers, timeout_s: float) -> None:
        self.state = State.AWAKE
        self._engine = engine
        self._routers = routers
        self._timeout_s = timeout_s
        self._level = 0
        self._asleep: list[str] = []
        self._lock = asyncio.Lock()

    def describe(self) -> Document:
        sleeping = self.state in (State.ASLEEP, State.WAKING)
        return Document(sleeping, self.state.value, self._level, self._asleep)

    async def sleep(self, level: int) -> Document:
        """Falls asleep; does nothing when asleep at this level. Raises Refused."""
        async with self._lock:
            if self.state is State.ASLEEP and level != self._level:
                raise Refused(
                    409, f"the node sleeps at level {self._level}: POST /wake_up before sleeping at level {level}"
                )
            started_s = time.monotonic()
            if self.state is State.AWAKE:
                self.state = State.FALLING_ASLEEP
                self._routers.drain()
            now = await self._engine.sleep(level, self._timeout_s, self._routers.leave)
            await self._routers.leave()  # also where it failed: the engine may have another epoch by now
            return self._settle(now, started_s)

    async def wake(self, tags: Sequence[str]) -> Document:
        """Wakes what the tags hold, and the node with the last of it; does nothing when awake. Raises Refused."""
        async with self._lock:
            if self.state is not State.ASLEEP:
                return self.describe()
            started_s = time.monotonic()
            self.state = State.WAKING
            return self._settle(await self._engine.wake(tags), started_s)

    def _settle(self, now: SleepState, started_s: float) -> Document:
        """Books what the engine says; an awake node joins its routers. Raises Refused where an order failed."""
        was, self.state = self.state, State.ASLEEP if now.level else State.AWAKE
        self._level, self._asleep = now.level, now.asleep
        if self.state is State.AWAKE:
            self._routers.join()
        if now.failure:
            log.error("%s failed, the node is %s: %s", was.value, self.state.value, now.failure)
            raise Refused(503, now.failure)
        what = f"level {now.level}, without memory: {', '.join(now.asleep)}" if now.level else "everything is back"
        log.info("%s after %.2f s: %s", self.state.value, time.monotonic() - started_s, what)
        return self.describe()
