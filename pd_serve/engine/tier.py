"""An engine's host tier, put together at its start: memory, copies, books. See :mod:`pd_serve.kv.tiers`.

Used by :mod:`pd_serve.engine.boot`. Without ``--host-kv-memory`` the books are the plain ones, and that is all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pd_serve.compute.backend import Backend
from pd_serve.compute.copies import Ended, HostCopies
from pd_serve.config import EngineConfig
from pd_serve.engine.arrivals import Arrivals, Copies
from pd_serve.engine.scheduler import Scheduler
from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout
from pd_serve.kv.manager import KVManager
from pd_serve.kv.tiered import TieredKVManager
from pd_serve.memory.region import PoolMemory
from pd_serve.values import readable_size

log = logging.getLogger(__name__)


def open_tier(
    config: EngineConfig,
    backend: Backend,
    layout: KVLayout,
    pool: PoolMemory,
    tell: Callable[[Ended], None] | None = None,
) -> HostCopies | None:
    """What copies to and from a rank's host tier; None where none is asked for. ``tell``: see
    :class:`pd_serve.compute.copies.HostCopies`. Raises ConfigError.
    """
    if not config.host_kv_memory:
        if config.host_kv_path:
            raise ConfigError("--host-kv-path is given without a size: add --host-kv-memory, how much it may take")
        return None
    if not config.prefix_caching:
        raise ConfigError("--host-kv-memory does not go with --no-prefix-caching: leave one of both out")
    size, pin_memory = config.host_kv_memory, config.pin_memory
    copies = HostCopies(backend.make_mover(layout, pool, size, config.host_kv_path, pin_memory=pin_memory), tell)
    log.info(
        "%s of the host for KV (%s): %d blocks beside the %d of the cache",
        readable_size(config.host_kv_memory),
        config.host_kv_mode,
        copies.num_slots[0] - 1,
        pool.regions[0].num_blocks - 1,
    )
    if config.weight_offload == "prefetch":
        log.warning(
            "--host-kv-memory beside --weight-offload prefetch: while steps run, copies of weights leave KV from the"
            " host hardly a turn on the bus; see docs/weight-offload.md"
        )
    return copies


def kv_manager(
    config: EngineConfig,
    layout: KVLayout,
    num_blocks: tuple[int, ...],
    capacity_tokens: int,
    fingerprint: str,
    copies: Copies | None,
) -> KVManager:
    if copies is None:
        caching = config.prefix_caching
        return KVManager(layout, num_blocks, capacity_tokens, prefix_caching=caching, fingerprint=fingerprint)
    return TieredKVManager(
        layout,
        num_blocks,
        capacity_tokens,
        num_slots=copies.num_slots,
        eager=config.host_kv_mode == "eager",
        fingerprint=fingerprint,
    )


def arrivals_of(kv: KVManager, scheduler: Scheduler, copies: Copies) -> Arrivals:
    """``kv``: of :func:`kv_manager` with these copies."""
    assert isinstance(kv, TieredKVManager)
    return Arrivals(kv, scheduler, copies)
