"""What an engine gives back of its memory while nobody needs it, and how it comes back.

The engine's core decides when: nothing runs, and no peer can reach the pool any more. A :class:`Sleeper` does it for
one kind of device; it must never change the pool's addresses, because what is built on them outlives a sleep.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from pd_serve.compute.cpu.runner import Runner
from pd_serve.memory.pool import HostPool
from pd_serve.memory.usage import KV_CACHE, WEIGHTS, Counter
from pd_serve.models.decoder import Decoder
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)

TAGS = (WEIGHTS, KV_CACHE)


class Sleeper(Protocol):
    """Called on the engine's main thread, between steps. Contents of the KV cache never survive a sleep."""

    @property
    def asleep(self) -> list[str]:
        """The tags of ``TAGS`` without physical memory: nothing can be computed while there is one."""

    def sleep(self, level: int) -> None:
        """Puts every tag to sleep. Level 1: weights are kept in host memory; level 2: they are dropped."""

    def wake(self, tags: Collection[str]) -> None:
        """Makes tags usable again, dropped weights by loading them anew; one that is awake stays as it is.

        Raises PDServeError or OSError, and the tags not reached are still asleep.
        """

    def report(self) -> MemoryReport:
        """What each tag holds now. Cheap: asked for every second."""


class HostSleeper:
    """On a CPU the weights lie in host memory anyway: level 1 gives back the KV cache alone."""

    def __init__(self, pool: HostPool, runner: Runner, load: Callable[[], Decoder]) -> None:
        self._pool = pool
        self._runner = runner
        self._load = load
        self._weights = Counter()
        self._count_weights()

    @property
    def asleep(self) -> list[str]:
        return self.report().asleep

    def sleep(self, level: int) -> None:
        if not self._pool.asleep:
            self._pool.release()
        if level == 2 and self._runner.model is not None:
            self._runner.unload()
            _give_back()
            self._count_weights()

    def wake(self, tags: Collection[str]) -> None:
        if KV_CACHE in tags and self._pool.asleep:
            self._pool.restore()
        if WEIGHTS in tags and self._runner.model is None:
            self._runner.load(self._load())
            self._count_weights()

    def _count_weights(self) -> None:
        model = self._runner.model
        size = 0 if model is None else model.weights.size_bytes
        self._weights.add(size - self._weights.used)
        self._weights.reserved = size

    def report(self) -> MemoryReport:
        pool = self._pool.report()
        asleep = [WEIGHTS] if self._runner.model is None else []
        return MemoryReport("cpu", {WEIGHTS: self._weights.usage(), **pool.tags}, asleep=asleep + pool.asleep)


def _give_back() -> None:
    """Makes the C library return what was freed: it keeps blocks below its mmap threshold for itself."""
    gc.unfreeze()  # the start froze what it left, the weights among it
    gc.collect()
    gc.freeze()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        log.debug("this C library has no malloc_trim: it may keep the memory of the weights")
