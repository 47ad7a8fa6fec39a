"""The GPUs that a process may use, and which of them each node of one machine gets. No torch here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from pd_serve.errors import ConfigError
from pd_serve.memory.cuda_driver import CudaDriver

VARIABLE = "CUDA_VISIBLE_DEVICES"


def count_gpus() -> int:
    """How many the driver lets this process see. There is one (:mod:`pd_serve.memory.choice`)."""
    return CudaDriver().device_count()


def need_gpus(each: int, seen: int) -> None:
    """For a node of ``each`` ranks. Raises ConfigError."""
    if each > seen:
        raise ConfigError(f"--tp {each}: a node wants {each} GPUs, and there {'is' if seen == 1 else 'are'} {seen}")


def deal_gpus(
    nodes: int,
    each: int,
    *,
    may_share: bool,
    count: Callable[[], int] = count_gpus,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """For each node what its ``CUDA_VISIBLE_DEVICES`` is to be: ``each`` GPUs, by turns.

    ``may_share``: the KV cache has a size that was given. Else every engine takes what is left of its GPU, and two that
    start on one at the same time would count each other's memory. Raises ConfigError.
    """
    seen = count()
    need_gpus(each, seen)
    if nodes * each > seen and not may_share:
        raise ConfigError(
            f"{nodes} nodes {f'of {each} GPUs ' * (each > 1)}and {seen} GPU{'s' * (seen > 1)}: start as many nodes "
            f"as there are GPUs for (--both {seen // each} starts nodes that prefill and decode), or say what each "
            "takes with --kv-cache-memory"
        )
    # CUDA numbers them by this variable's order, and ends at a name that it does not know
    named = (os.environ if environ is None else environ).get(VARIABLE, "").split(",")
    names = named if len(named) >= seen and named[0] else [str(number) for number in range(seen)]
    return [",".join(names[at % seen].strip() for at in range(i * each, (i + 1) * each)) for i in range(nodes)]
