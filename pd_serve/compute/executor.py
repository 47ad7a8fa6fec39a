"""What computes steps for an engine: one device, or a group of them. Each kind has its folder under ``compute``.

The engine's loop launches and collects, and decides when memory goes: nothing runs then, and no peer can reach the
pool any more. An executor must never change the pool's addresses, because what is built on them outlives a sleep.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar

from pd_serve.compute.step import Sampled, Step
from pd_serve.memory.region import PoolMemory
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.wire.memory import MemoryReport

TAGS = (WEIGHTS, KV_CACHE)

L = TypeVar("L")  # a launched step


class Executor(Protocol[L]):
    """Called on the engine's main thread only."""

    @property
    def depth(self) -> int:
        """How many launched steps may be uncollected when the next is launched: 0 or 1."""

    def launch(self, step: Step) -> L:
        """Begins a step, and returns at once where the device runs by itself. The step is the executor's then.

        Raises whatever it likes: the step then counts as not launched, and may come again, in parts and with its
        histories and biases, after all that was launched before has been collected.
        """

    def collect(self, launched: L) -> Sampled:
        """Waits for the oldest step that was launched. Raises as :meth:`launch`; the step after it is then collected,
        too, and what comes of it is dropped.
        """

    def done(self, launched: L) -> bool:
        """Whether :meth:`collect` would not wait."""

    def memory(self) -> list[PoolMemory]:
        """A rank: the pool that its transfer end registers. Known before :meth:`load`."""

    def load(self) -> None:
        """Loads the weights, at the start. Raises PDServeError or OSError."""

    def warm_up(self) -> None:
        """Does what the first steps would wait for, such as compiling. Leaves nothing in the KV cache."""

    @property
    def asleep(self) -> list[str]:
        """The tags of ``TAGS`` without physical memory: nothing can be computed while there is one."""

    def sleep(self, level: int) -> None:
        """Puts every tag to sleep. Level 1: weights are kept in host memory; level 2: they are dropped.

        Contents of the KV cache never survive a sleep.
        """

    def wake(self, tags: Collection[str]) -> None:
        """Makes tags usable again, dropped weights by loading them anew; one that is awake stays as it is.

        Raises PDServeError or OSError, and the tags not reached are still asleep.
        """

    def report(self) -> MemoryReport:
        """What each tag holds now. Cheap: asked for every second."""

    def close(self) -> None:
        """Ends what belongs to it: other ranks, a device's memory."""
