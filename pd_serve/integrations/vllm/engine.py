"""What the connector asks vLLM about itself: the model, the groups of its cache, the ranks. Read once, at the start.

Here, and in :mod:`.connector`, is all that depends on vLLM's version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from pd_serve.errors import ConfigError
from pd_serve.integrations.vllm.memory import CacheGroup
from pd_serve.models.config import fingerprint

log = logging.getLogger(__name__)

# Since 0.30 a worker names the requests whose prompts it could not get; before, only blocks, which are ambiguous where
# layers have several groups.
NAMES_FAILED_REQUESTS = hasattr(vllm_base, "KVConnectorTransferResults")

# The layout with all layers of a block side by side, where layouts have names of five letters.
WHOLE_BLOCKS = "BLHNC" if find_spec("vllm.v1.kv_cache_layout") else None

_WHOLE = ("FullAttentionSpec", "MLAAttentionSpec")
_WINDOW = ("SlidingWindowSpec",)
_NOT_IDENTITY = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "architectures_override")


def check(config: Any, caches: Any) -> None:
    """Raises ConfigError for what this connector cannot do, at the start, in both halves."""
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"PdServeConnector does not know {name} > 1 yet: use tensor parallelism")
    if getattr(config.model_config, "enable_sleep_mode", False):
        raise ConfigError("PdServeConnector does not know vLLM's sleep mode: what peers may read would go away")
    if getattr(caches, "needs_kv_cache_zeroing", False):
        raise ConfigError("PdServeConnector hands over attention's KV only: this model keeps other state beside it")
    groups = groups_of(caches)
    if len(groups) > 1 and not NAMES_FAILED_REQUESTS:
        raise ConfigError(
            "this vLLM cannot be told which prompt failed to arrive where layers form several groups: use a newer one, "
            "or --disable-hybrid-kv-cache-manager"
        )
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        log.warning(
            'a prompt whose blocks cannot be fetched ends with an error; "kv_load_failure_policy": "recompute" in '
            "--kv-transfer-config computes it here instead"
        )


def groups_of(caches: Any) -> tuple[CacheGroup, ...]:
    """Raises ConfigError for kinds of layers that pd-serve does not know."""
    found = []
    for group in caches.kv_cache_groups:
        # layers of different shapes may share a group: then each has a kind of its own
        inner = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        specs = list(inner.values()) if inner else [group.kv_cache_spec]
        names = {type(spec).__name__ for spec in specs}
        windows = {None if type(spec).__name__ in _WHOLE else getattr(spec, "sliding_window", None) for spec in specs}
        if not names <= {*_WHOLE, *_WINDOW} or len(windows) != 1 or not getattr(group, "enable_kv_transfer", True):
            raise ConfigError(f"PdServeConnector does not know a KV cache of {', '.join(sorted(names))}")
        found.append(CacheGroup(tuple(group.layer_names), group.kv_cache_spec.block_size, windows.pop()))
    return tuple(found)


def model_of(config: Any) -> str:
    """16 hex digits that two servers must share: configuration, weights where they are files here, types."""
    model = config.model_config
    said = {k: v for k, v in json.loads(model.hf_config.to_json_string()).items() if k not in _NOT_IDENTITY}
    load_format = str(config.load_config.load_format)
    path = Path(model.model)
    if (path / "config.json").is_file():
        weights = fingerprint(path, str(model.dtype), "dummy" if load_format == "dummy" else "safetensors")
    else:
        weights = f"{model.model}@{model.revision}"
    words = [weights, str(model.dtype), str(model.quantization), config.cache_config.cache_dtype, said]
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()[:16]


def name_of(config: Any) -> tuple[str, str]:
    """This engine's name and epoch: the same in the scheduler and all workers, and new at each start."""
    engine = str(config.kv_transfer_config.engine_id)
    return f"vllm-{socket.gethostname()}-{engine[:8]}"[:200], f"{engine}-{config.instance_id}"[-200:]


def order_of(config: Any, layers: Iterable[str]) -> str:
    """How vLLM says that it lays blocks out: what of it cannot be seen in a tensor's shape."""
    modules = [config.compilation_config.static_forward_context.get(name) for name in layers]
    backends = {one.get_attn_backend().get_name() for one in modules if hasattr(one, "get_attn_backend")}
    ranks = config.parallel_config.tensor_parallel_size
    return f"{'+'.join(sorted(map(str, backends))) or 'unknown'} tp={ranks}"


def rank() -> int:
    """Of this worker's, among those that share the heads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def device() -> int | None:
    """The ordinal of this worker's NVIDIA GPU; None without one."""
    import torch
    from vllm.platforms import current_platform

    return int(torch.cuda.current_device()) if current_platform.is_cuda() else None
