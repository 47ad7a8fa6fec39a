"""How many blocks a KV cache has and how long sequences may be: arithmetic on settings and a model's configuration.

Called by engines, and by ``up`` before it starts any. No torch here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pd_serve.config import EngineSettings
from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.preflight import memory_bytes
from pd_serve.values import readable_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    model: ModelConfig  # for sequences of that length
    layout: KVLayout
    num_blocks: int  # of every layer group, the null block included; 0: what the device turns out to have room for
    max_model_len: int  # tokens


def sizes(settings: EngineSettings, directory: Path, template: str, *, rank: int = 0) -> Sizes:
    """Of a rank, for the model in ``directory``, with ``dtype`` resolved. ``template``: see ``EngineConfig``.

    Raises ConfigError, ModelError.
    """
    model = ModelConfig.from_directory(directory, template).for_rank(rank, settings.tp)
    layout = KVLayout(settings.block_tokens, _kv_dtype(settings, model), model.layer_groups())
    size = settings.kv_cache_bytes
    if settings.device != "cuda":
        _check_memory(settings, model)
    num_blocks = _num_blocks(layout, size) if size else 0
    capacity = (num_blocks - 1) * settings.block_tokens if size else model.max_model_len
    max_model_len = _max_model_len(settings, model, capacity)
    return Sizes(model.for_length(max_model_len), layout, num_blocks, max_model_len)


def weight_numbers(model: ModelConfig) -> int:
    """How many numbers a rank's matrices have: norms and biases are next to nothing beside them."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    experts = 0 if model.experts is None else model.experts.count * model.experts.intermediate_size
    total = model.hidden_size * model.head_rows * (1 if model.tie_word_embeddings else 2)
    for layer in range(model.num_layers):
        sparse = model.experts is not None and layer in model.experts.layers
        mlp = experts if sparse else model.intermediate_size
        total += model.hidden_size * (heads * model.head_dim + 3 * mlp)
    return total


def _check_memory(settings: EngineSettings, model: ModelConfig) -> None:
    """A system that runs out of memory kills processes without a word."""
    dtype_bytes = 4 if settings.dtype == "float32" else 2  # FP8 is dequantised on cores
    weights, present = weight_numbers(model) * dtype_bytes * settings.tp, memory_bytes()
    if weights + settings.kv_cache_bytes * settings.tp <= present:
        return
    smaller = " --dtype bfloat16, which halves the weights, or" if dtype_bytes == 4 else ""
    raise ConfigError(
        f"--model {settings.model} does not fit: its weights are {readable_size(weights)} in {settings.dtype}, "
        f"--kv-cache-memory is {readable_size(settings.kv_cache_bytes)}, and this machine or container has "
        f"{readable_size(present)} of memory; choose{smaller} a smaller model"
    )


def _kv_dtype(settings: EngineSettings, model: ModelConfig) -> str:
    """As a layout has it."""
    asked = settings.kv_cache_dtype
    if asked.startswith("fp8") or (asked == "auto" and model.quantization and model.quantization.kv_cache):
        return "float8_e4m3fn"
    if asked not in ("auto", settings.dtype):
        raise ConfigError(
            f"--kv-cache-dtype {asked} does not go with --dtype {settings.dtype}: the cache is in the same format, or "
            "in FP8"
        )
    return settings.dtype


def _max_model_len(settings: EngineSettings, model: ModelConfig, capacity: int) -> int:
    """The longest sequence: what the user asks for, or the model's limit as far as the KV cache has room for it."""
    if settings.max_model_len > model.max_model_len:
        raise ConfigError(
            f"max_model_len {settings.max_model_len} is more than the model takes, {model.max_model_len} tokens "
            "(max_position_embeddings and rope scaling of its config.json): lower --max-model-len"
        )
    limit = settings.max_model_len or model.default_model_len
    if capacity >= limit:
        return limit
    if settings.max_model_len:
        raise ConfigError(
            f"max_model_len {limit} does not fit the KV cache of {capacity} tokens: "
            f"raise --kv-cache-memory or lower --max-model-len"
        )
    log.info("max_model_len is %d, what --kv-cache-memory has room for (the model could take %d)", capacity, limit)
    return capacity


def _num_blocks(layout: KVLayout, kv_cache_bytes: int) -> int:
    """Blocks of every group, the null block included. Windowed groups get as many as the others: short prompts
    need them, and what long ones leave over keeps prefixes."""
    each = sum(layout.block_bytes(group) for group in range(len(layout.groups)))
    count = kv_cache_bytes // each
    if count < 3:
        raise ConfigError(
            f"a KV cache of {readable_size(kv_cache_bytes)} has room for {count} blocks of {readable_size(each)}; "
            f"raise --kv-cache-memory to at least {readable_size(64 * each)}"
        )
    return count
