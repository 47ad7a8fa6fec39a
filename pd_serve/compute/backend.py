"""A kind of device, as the start of an engine sees it. The only place where one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from pd_serve.compute.copies import Mover
from pd_serve.compute.executor import Executor
from pd_serve.config import EngineConfig
from pd_serve.distributed.group import Group
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import PoolMemory
from pd_serve.models.sizes import Sizes

if TYPE_CHECKING:
    import torch


Meet = Callable[["torch.device"], Group]


class Backend(Protocol):
    """A module of the device's folder."""

    SATURATING_TOKENS: int  # in a step: from so many on, more of them cost in proportion

    def make_executor(self, config: EngineConfig, fit: Sizes, meet: Meet | None, /) -> Executor[Any]:
        """Of a rank. Allocates the KV cache; weights come with ``Executor.load`` at the latest.

        ``meet``: finds the other ranks, where there are some. Raises PDServeError.
        """

    def make_mover(
        self, layout: KVLayout, pool: PoolMemory, size_bytes: int, directory: str, /, *, pin_memory: bool
    ) -> Mover:
        """Of a host tier of that size, in a file of ``directory`` where one is given. ``pin_memory``: the setting.

        Raises ConfigError.
        """


def backend_for(config: EngineConfig) -> Backend:
    """What ``--device`` says. What it imports need not be installed elsewhere."""
    if config.device == "cuda":
        from pd_serve.compute.cuda import backend as cuda

        return cuda
    from pd_serve.compute.cpu import backend as cpu

    return cpu
