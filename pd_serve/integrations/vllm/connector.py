"""The class that vLLM loads. It hands each call on; what it does itself is to know which calls which version makes.

Of methods that only some versions call: ``prefer_cross_layer_blocks`` and ``register_cross_layers_kv_cache`` are the
way to whole blocks up to 0.28, the layout's name is from 0.29 on; from 0.30 on ``get_transfer_results`` is called in
place of ``get_finished``, and from 0.31 on ``get_mem_pool_context``.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from pd_serve.engine.ends import RankEnds, open_ends
from pd_serve.integrations.vllm import engine, memory, settings
from pd_serve.integrations.vllm.device import Memory, device_memory, supplied
from pd_serve.integrations.vllm.orders import Orders
from pd_serve.integrations.vllm.scheduler_side import SchedulerSide
from pd_serve.integrations.vllm.worker_side import Results, WorkerSide
from pd_serve.interpreter import main_thread, switch_often
from pd_serve.transfer.session.handshake import Identity
from pd_serve.wire.link import Source

log = logging.getLogger(__name__)


@dataclass
class StepOrders(KVConnectorMetadata):
    orders: Orders


@dataclass
class Address(KVConnectorHandshakeMetadata):
    """Of a rank, as readers dial it; empty where it does not send."""

    address: str


class PdServeConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._sends, self._receives = transfer.is_kv_producer, transfer.is_kv_consumer
        self._settings = settings.load(transfer.kv_connector_extra_config, sends=self._sends, receives=self._receives)
        _log_with_vllm(self._settings.log_level)
        engine.check(vllm_config, kv_cache_config)
        self._groups = engine.groups_of(kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._ends: RankEnds | None = None
        self._worker: WorkerSide | None = None
        self._address = ""
        self._memory: Memory | None = None
        self._failed_blocks: set[int] = set()
        self._computes = True  # in this step
        if role is KVConnectorRole.SCHEDULER:
            windows = tuple(group.window for group in self._groups)
            self._scheduler = SchedulerSide(self._groups[0].block_size, windows, receives=self._receives)

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "the scheduler's"
        return self._scheduler

    # --- the scheduler's process

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        addresses = tuple(metadata[rank].address for rank in sorted(metadata))
        if self._sends and all(addresses):
            self._side.source = Source(*engine.name_of(self._vllm_config), addresses)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count = self._side.matched(request, num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._side.allocated(request, blocks.get_block_ids(), num_external_tokens)
        self._side.begun(request)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return StepOrders(self._side.orders(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._side.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._side.finished(request)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return tuple(range(len(self._groups)))

    # --- a worker's process

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """A wish that vLLM leaves aside where an attention backend cannot do it, or VLLM_KV_CACHE_LAYOUT says else."""
        return engine.WHOLE_BLOCKS

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Asked by 0.33."""
        return False

    def get_mem_pool_context(self) -> Any:
        """Asked before the KV cache is made. vLLM's own cumem allocator stays where it is on."""
        device, model = engine.device(), self._vllm_config.model_config
        theirs = getattr(model, "enable_cumem_allocator", False)
        if device is None or theirs or self._settings.enable_cumem_allocator is False:
            return None
        return supplied(device)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """All layers of a block side by side are one read. vLLM offers it where its runner and layout can do it."""
        return True

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        """One tensor of all layers, in place of :meth:`register_kv_caches`."""
        (group,) = self._groups
        whole = memory.CacheGroup(group.layers[:1], group.block_size, group.window)
        self._register({group.layers[0]: kv_cache}, (whole,))

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._register(kv_caches, self._groups)

    def _register(self, caches: dict[str, Any], groups: tuple[memory.CacheGroup, ...]) -> None:
        first = next(iter(caches.values()))
        order = engine.order_of(self._vllm_config, caches)
        dtype = str(first.dtype).removeprefix("torch.")
        found = memory.find(caches, groups, self._kv_cache_config.num_blocks, order=order, dtype=dtype)
        self._open(found, first.device)

    def _open(self, found: memory.Found, device: Any) -> None:
        self._memory = held = device_memory(found.regions, device)
        node_id, epoch = engine.name_of(self._vllm_config)
        identity = Identity(
            node_id=node_id,
            epoch=epoch,
            model=engine.model_of(self._vllm_config),
            layout=found.layout,
            secret=self._settings.node_secret().encode(),
            checksums=self._settings.checksums,
            rank=engine.rank(),
            ranks=self._vllm_config.parallel_config.tensor_parallel_size,
        )
        if held.memory.device is not None:
            switch_often()
        main_thread.at_work = True  # vLLM does not say when it needs the interpreter: the transfer thread never spins
        self._ends = ends = open_ends(self._settings, identity, held.memory)
        ends.worker.wait_ready(self._settings.transport_timeout_s)
        if self._sends:
            (self._address,) = ends.outbox.listen(self._settings.transport_timeout_s)
        self._worker = WorkerSide(ends.outbox, ends.inbox, found.groups, offer_s=self._settings.pull_timeout_s)
        log.info(
            "pd-serve's transfer is ready%s over %s: %d blocks in %d places, '%s'",
            f" at {self._address}" if self._address else "",
            ends.worker.transport,
            found.regions[0].num_blocks,
            sum(len(region.places) for region in found.regions),
            found.layout.foreign,
        )

    def get_handshake_metadata(self) -> Address:
        return Address(self._address)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._computes = connector_metadata.orders.computes
        if self._worker is not None:
            self._worker.withdraw(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.begin(self._orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded while a step computes."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are announced when a step has computed all layers."""

    def wait_for_save(self) -> None:
        if self._worker is None or self._memory is None or not self.has_connector_metadata():
            return
        if self._orders.announced:
            self._worker.announce(self._orders, self._memory.step_ended())

    @property
    def _orders(self) -> Orders:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepOrders)
        return meta.orders

    def _results(self) -> Results:
        """Of this step. Where failed requests have no names, their blocks are told."""
        if self._worker is not None:
            self._worker.rest(computes=self._computes)
        results = self._worker.results() if self._worker is not None else Results()
        self._failed_blocks = set() if engine.NAMES_FAILED_REQUESTS else results.failed_blocks
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self._results()
        return results.sent or None, results.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = self._results()
        return vllm_base.KVConnectorTransferResults(results.sent, results.received, results.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        if self._ends is not None:
            self._ends.worker.close()
            self._ends.outbox.close()
            self._ends.inbox.close()
            self._ends = self._worker = None


def _log_with_vllm(level: str) -> None:
    """What pd-serve has to say comes where vLLM's own lines come. ``level``: the least severe."""
    ours, theirs = logging.getLogger("pd_serve"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in map(copy.copy, theirs.handlers):
            handler.setLevel(logging.NOTSET)
            ours.addHandler(handler)
        ours.propagate = not theirs.handlers
        ours.setLevel(level.upper())
