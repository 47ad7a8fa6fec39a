"""Which memory an engine uses: what was asked for, held against what the machine offers.

The node decides once at start (:func:`resolve`), the engine checks what it is about to do. What cannot be had
and was asked for is a ConfigError at start, never a surprise later. No torch here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pd_serve.errors import ConfigError
from pd_serve.memory import alloc_conf
from pd_serve.memory.cuda_driver import CudaDriver, reason
from pd_serve.memory.driver import DriverError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    enable_cumem_allocator: bool
    enable_sleep_mode: bool


def cumem_unavailable_because(device: int = 0) -> str:
    """The reason and what to do, or an empty text where the cumem allocator is available."""
    try:
        driver = CudaDriver()
        count = driver.device_count()
        if device >= count:
            return f"there is no GPU {device}, only {count}"
        facts = driver.device_facts(device)
    except DriverError as error:
        return reason(error)
    if not facts.virtual_memory:
        return f"the driver offers no virtual memory on {facts.name} (virtual GPUs and WSL may lack it)"
    return ""


def resolve(
    enable_cumem_allocator: bool | None,
    enable_sleep_mode: bool,
    *,
    on_gpu: bool,
    why_not: Callable[[], str] = cumem_unavailable_because,
) -> Decision:
    """``None``: nothing was asked for. ``why_not``: why the engine's GPU has no cumem allocator. Raises ConfigError."""
    if not on_gpu:
        if enable_cumem_allocator:
            raise ConfigError(
                "--enable-cumem-allocator: engines compute on the CPU here, and the allocator is for GPU memory; "
                "leave the flag out (sleep mode works without it)"
            )
        return Decision(False, enable_sleep_mode)
    if enable_cumem_allocator is False:
        if enable_sleep_mode:
            raise ConfigError(
                "--enable-sleep-mode needs the cumem allocator on a GPU, and --no-enable-cumem-allocator forbids it; "
                "leave one of the two out"
            )
        return Decision(False, False)
    missing = why_not()
    if missing and enable_cumem_allocator:
        raise ConfigError(f"--enable-cumem-allocator: {missing}")
    if missing and enable_sleep_mode:
        raise ConfigError(f"--enable-sleep-mode needs the cumem allocator: {missing}")
    if missing:
        log.warning("KV memory is plain device memory, which peers may read more slowly: %s", missing)
    if enable_sleep_mode and enable_cumem_allocator is None:
        log.info("sleep mode switches the cumem allocator on")
    return Decision(not missing, enable_sleep_mode)


def check_expandable_segments(*, on_gpu: bool, cumem: bool, environ: Mapping[str, str] | None = None) -> None:
    """Before KV memory is registered. Raises ConfigError where torch could remap it under its registration."""
    variable, text = alloc_conf.from_environment(environ)
    if on_gpu and not cumem and alloc_conf.has_expandable_segments(text):
        raise ConfigError(
            f"{variable}={text}: with expandable segments torch remaps memory that peers have registered, and their "
            f"reads fail (IBV_WC_REM_ACCESS_ERR). Allocate KV memory with --enable-cumem-allocator, or set "
            f"{variable}={alloc_conf.with_expandable_segments(text, False)}"
        )
