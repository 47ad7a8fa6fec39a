"""Computes steps on this machine's cores, within ``launch``.

Weights lie in host memory anyway: a sleep of level 1 gives back the KV cache alone.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Collection

from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.cpu.sampler import Sampler
from pd_serve.compute.step import Sampled, Step
from pd_serve.memory.pool import HostPool
from pd_serve.memory.region import PoolMemory
from pd_serve.memory.usage import KV_CACHE, WEIGHTS, Counter
from pd_serve.models.decoder import Decoder
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)


class LocalExecutor:
    """See :class:`pd_serve.compute.executor.Executor`. ``read_weights``: for :meth:`load`, and after a deep sleep."""

    depth = 0

    def __init__(self, pool: HostPool, runner: Runner, sampler: Sampler, read_weights: Callable[[], Decoder]) -> None:
        self._pool = pool
        self._runner = runner
        self._sampler = sampler
        self._read_weights = read_weights
        self._weights = Counter()

    def launch(self, step: Step) -> Sampled:
        return self._sampler.sample(step, self._runner.execute(step))

    def collect(self, launched: Sampled) -> Sampled:
        return launched

    def done(self, launched: Sampled) -> bool:
        return True

    def memory(self) -> list[PoolMemory]:
        return [self._pool.memory()]

    def load(self) -> None:
        self._runner.model = self._read_weights()
        self._count_weights()

    def warm_up(self) -> None:
        self._runner.warm_up()
        self._sampler.warm_up()
        self._pool.populate()

    @property
    def asleep(self) -> list[str]:
        return self.report().asleep

    def sleep(self, level: int) -> None:
        if not self._pool.asleep:
            self._pool.release()
        if level == 2 and self._runner.model is not None:
            self._runner.model = None
            _give_back()
            self._count_weights()

    def wake(self, tags: Collection[str]) -> None:
        if KV_CACHE in tags and self._pool.asleep:
            self._pool.restore()
        if WEIGHTS in tags and self._runner.model is None:
            self.load()

    def _count_weights(self) -> None:
        model = self._runner.model
        size = 0 if model is None else model.weights.size_bytes
        self._weights.add(size - self._weights.used)
        self._weights.reserved = size

    def report(self) -> MemoryReport:
        pool = self._pool.report()
        asleep = [WEIGHTS] if self._runner.model is None else []
        return MemoryReport("cpu", {WEIGHTS: self._weights.usage(), **pool.tags}, asleep=asleep + pool.asleep)

    def close(self) -> None:
        """The process ends, and its memory with it."""


def _give_back() -> None:
    """Makes the C library return what was freed: it keeps blocks below its mmap threshold for itself."""
    gc.unfreeze()  # the start froze what it left, the weights among it
    gc.collect()
    gc.freeze()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        log.debug("this C library has no malloc_trim: it may keep the memory of the weights")
