"""How a checkpoint's matrices are quantised, read from ``quantization_config`` of its ``config.json``. No torch here.

FP8 alone (e4m3), in the forms in which models are published: ``fp8`` (a scale for each block of 128 x 128, as
DeepSeek's and Qwen's, or for each matrix, as AutoFP8 writes) and ``compressed-tensors`` (a scale for each matrix, row
or block). Must never guess: anything else is a ``ModelError`` that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_serve.errors import ModelError
from pd_serve.models.fields import flag, mapping

BLOCK = 128  # rows and columns that share a scale, where blocks do
_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Quantization:
    """Of the matrices that are quantised; which those are the tensors of the files say, where there are files."""

    blocks: bool  # a scale for each block; else for each row, or one for all rows
    scale: str  # how a matrix's tensor of scales is called, behind the name of its module
    static_inputs: bool  # inputs of a matrix have an ``input_scale`` in the files; else it is found anew
    ignored: tuple[str, ...] = ()  # modules that are not quantised: names, their beginnings or ends, or "re:" patterns
    kv_cache: bool = False  # K and V are to be kept in FP8 too

    def covers(self, module: str) -> bool:
        """Whether a linear layer of this name is quantised: for made-up weights, where there are no tensors to ask."""
        return not any(_matches(pattern, module) for pattern in self.ignored)


def parse(c: Mapping[str, Any]) -> Quantization | None:
    """Of the contents of ``config.json``; None: not quantised. Raises ``ModelError``."""
    q = mapping(c, "quantization_config")
    if not q:
        return None
    method = q.get("quant_method")
    if method == "fp8":
        return _fp8(q)
    if method == "compressed-tensors":
        return _compressed(q)
    raise ModelError(
        f"{_WHERE} has the quant_method {method!r:.80}; supported are fp8 and compressed-tensors with FP8 numbers. Use "
        "such a checkpoint, one in float32, bfloat16 or float16, or a GGUF file."
    )


def _fp8(q: Mapping[str, Any]) -> Quantization:
    _only(q, "fmt", "e4m3", "float8_e4m3fn")
    size, scheme = q.get("weight_block_size"), q.get("activation_scheme", "dynamic")
    if size not in (None, [BLOCK, BLOCK]):
        raise _unsupported("weight_block_size", size, f"null and [{BLOCK}, {BLOCK}]")
    if scheme not in ("dynamic", "static") or (size and scheme == "static"):
        raise _unsupported("activation_scheme", scheme, "dynamic" + ("" if size else " and static"))
    kv = q.get("kv_cache_scheme")
    if kv not in (None, "static"):
        raise _unsupported("kv_cache_scheme", kv, "null and static")
    ignored = (*_names(q, "ignored_layers"), *_names(q, "modules_to_not_convert"))
    name = "weight_scale_inv" if size else "weight_scale"
    return Quantization(size is not None, name, scheme == "static", ignored, kv is not None)


def _compressed(q: Mapping[str, Any]) -> Quantization:
    _only(q, "format", "float-quantized", "naive-quantized")
    groups = mapping(q, "config_groups")
    if len(groups) != 1:
        raise _unsupported("config_groups", sorted(groups), "a single group for all linear layers")
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"]:
        raise _unsupported("config_groups", group, 'a group with the targets ["Linear"]')
    weights, inputs = mapping(group, "weights"), mapping(group, "input_activations")
    if group.get("output_activations"):
        raise _unsupported("output_activations", group["output_activations"], "null")
    strategy = weights.get("strategy")
    _float8(weights, "weights", "tensor", "channel", "block")
    if flag(weights, "dynamic"):
        raise _unsupported("weights.dynamic", True, "false")
    if strategy == "block" and weights.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        raise _unsupported("weights.block_structure", weights.get("block_structure"), f"[{BLOCK}, {BLOCK}]")
    if not inputs:
        raise _unsupported("input_activations", None, "FP8 activations")
    _float8(inputs, "input_activations", "tensor", "token", "group")
    if inputs.get("strategy") == "group" and (strategy != "block" or inputs.get("group_size") != BLOCK):
        raise _unsupported("input_activations.group_size", inputs.get("group_size"), f"{BLOCK}, with blocks of weights")
    static = not flag(inputs, "dynamic")
    if static and (strategy == "block" or inputs.get("strategy") != "tensor"):
        raise _unsupported("input_activations.dynamic", False, "true, or false with one scale for all inputs")
    kv = mapping(q, "kv_cache_scheme")
    if kv:
        _float8(kv, "kv_cache_scheme", "tensor")
        if flag(kv, "dynamic"):
            raise _unsupported("kv_cache_scheme.dynamic", True, "false")
    return Quantization(strategy == "block", "weight_scale", static, _names(q, "ignore"), bool(kv))


def _float8(part: Mapping[str, Any], what: str, *strategies: str) -> None:
    kind = part.get("type"), part.get("num_bits")
    if kind != ("float", 8):
        raise _unsupported(what, f"{kind[1]} bits of type {kind[0]}", "8 bits of type float")
    if not flag(part, "symmetric", default=True):
        raise _unsupported(f"{what}.symmetric", False, "true")
    if part.get("strategy") not in strategies:
        raise _unsupported(f"{what}.strategy", part.get("strategy"), ", ".join(strategies))


def _only(q: Mapping[str, Any], key: str, *allowed: str) -> None:
    if q.get(key) not in (None, *allowed):
        raise _unsupported(key, q[key], ", ".join(allowed))


def _unsupported(key: str, value: object, supported: str) -> ModelError:
    return ModelError(f"{_WHERE}: {key} {value!r:.80} is not supported; supported: {supported}.")


def _names(q: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = q.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{_WHERE}: {key} must be a list of names.")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ModelError(f"{_WHERE}: {key} has {name!r:.80}, which is no pattern: {error}.") from None
    return tuple(names)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")
