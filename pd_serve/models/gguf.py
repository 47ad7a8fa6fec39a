"""Converts a GGUF file into a HuggingFace directory: config, weights, tokenizer.

Called by :mod:`pd_serve.models.source`, once for a file and dtype. Quantised tensors are dequantised by the ``gguf``
package; float32 keeps those values exactly, bfloat16 rounds them to nearest even. Uses neither torch nor
transformers, so that a node process may convert. Must never write a tensor that it does not understand.

What llama.cpp's converter does to the weights is undone here: it interleaves the rotary halves of q and k
(architecture ``llama``), adds one to Gemma's norm weights, and stores llama3 rope scaling as a tensor of factors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.errors import ModelError
from pd_serve.models.gguf_reader import GGUFFile, GGUFTensor
from pd_serve.models.gguf_tokenizer import write_tokenizer

Progress = Callable[[int, int], None]  # elements done, elements in all
F32 = npt.NDArray[np.float32]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_ROPE_FACTORS = "rope_freqs.weight"
_GEMMA3_27B_LAYERS = 62  # the one Gemma 3 that scales queries by its hidden size a head, not by its head size
_SLICE = 1 << 22  # elements rounded at a time


def convert(
    path: Path, directory: Path, dtype: str, progress: Progress, generation: Mapping[str, float] | None = None
) -> None:
    """Writes ``directory`` (which exists) from the GGUF file. ``dtype`` float32 or bfloat16.

    ``generation``: sampling defaults beside those that the file names.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge first.")
    with GGUFFile(path) as file:
        config = _config(file)
        ids = write_tokenizer(file.metadata, directory, config["max_position_embeddings"])
        config |= {**ids, "torch_dtype": dtype}
        sampling = {key: file.metadata[name] for name, key in _SAMPLING.items() if name in file.metadata}
        _write_json(directory / "generation_config.json", {**ids, **sampling, **(generation or {})})
        _write_safetensors(file, config, directory / "model.safetensors", dtype, progress)
        # last: a directory with a config.json is complete
        _write_json(directory / "config.json", config)


def to_bfloat16(values: F32) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even (NaN stays NaN)."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    out = np.empty(bits.size, np.uint16)
    for at in range(0, bits.size, _SLICE):
        part = bits[at : at + _SLICE]
        rounded = (part + (((part >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        nan = (part & 0x7FFFFFFF) > 0x7F800000
        out[at : at + _SLICE] = np.where(nan, (part >> 16) | 0x40, rounded)
    return out.reshape(values.shape)


def _config(file: GGUFFile) -> dict[str, Any]:
    """The contents of ``config.json``, token ids excepted."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(f"{file.path} holds architecture {arch!r}; supported are {', '.join(ARCHITECTURES)}.")

    def get(key: str, *default: Any) -> Any:
        name = f"{arch}.{key}"
        if name in file.metadata:
            return file.metadata[name]
        if default:
            return default[0]
        raise ModelError(f"{file.path} lacks {name}; it cannot be converted.")

    if get("expert_count", 0):
        raise ModelError(f"{file.path} is a mixture of experts, which is not supported yet.")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden // heads))
    if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: rotary embeddings of part of a head, or K and V of two sizes, are unsupported.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path} holds no token_embd.weight; it is no whole model.")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": "gemma3_text" if arch == "gemma3" else arch,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 1_000_000.0 if arch == "gemma3" else 10_000.0),
        "rope_scaling": _rope_scaling(file, get, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    bias = "blk.0.attn_q.bias" in file.tensors
    if arch == "gemma3":
        scalar = hidden // heads if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS else head_dim
        config |= _gemma3_config(get, scalar)
    elif arch == "llama":
        config |= {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
        if window := get("attention.sliding_window", 0):
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    else:
        config |= {"hidden_act": "silu", "use_sliding_window": False}
        if arch == "qwen3":
            config["attention_bias"] = bias
    return config


def _gemma3_config(get: Callable[..., Any], scalar: int) -> dict[str, Any]:
    config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": get("attention.sliding_window"),
        "rope_local_base_freq": get("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": get("final_logit_softcapping", None),
    }
    pattern = get("attention.sliding_window_pattern", 6)  # every n-th layer is global, or a flag for each layer
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    else:
        config["sliding_window_pattern"] = pattern
    return config


def _rope_scaling(file: GGUFFile, get: Callable[..., Any], head_dim: int) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        factors = file.dequantize(file.tensors[_ROPE_FACTORS])
        return _llama3_scaling(factors, get("rope.freq_base", 10_000.0), head_dim)
    kind = get("rope.scaling.type", "linear" if get("rope.scaling.factor", 0) else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported; supported are linear, yarn, llama3.")
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(factors: F32, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters behind a tensor of rope factors: those of Llama 3.1 to 3.3, checked against the tensor."""
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError("The GGUF file scales rope by factors other than Llama 3's, which is not supported.")
    return scaling


def _hf_name(name: str, arch: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    part = (_GEMMA3_BLOCK if arch == "gemma3" else _BLOCK).get(match[2]) if match else None
    return f"model.layers.{match[1]}.{part}.{match[3]}" if match and part else None


def _write_safetensors(file: GGUFFile, config: dict[str, Any], path: Path, dtype: str, progress: Progress) -> None:
    arch = file.metadata["general.architecture"]
    item, code = (4, "F32") if dtype == "float32" else (2, "BF16")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    todo: list[GGUFTensor] = []
    at = 0
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FACTORS:
            continue
        name = _hf_name(tensor.name, arch)
        if name is None:
            raise ModelError(f"{file.path}: the tensor {tensor.name} is not known in architecture {arch}.")
        size = math.prod(tensor.shape) * item
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [at, at + size]}
        todo.append(tensor)
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)  # the data begins on a page
    total = at // item
    done = 0
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in todo:
            for values in _pieces(_as_hf(file.dequantize(tensor), tensor.name, arch, config)):
                out.write((values if dtype == "float32" else to_bfloat16(values)).data)
                done += values.size
                progress(done, total)


def _pieces(values: F32) -> Iterator[F32]:
    flat = values.reshape(-1)
    for at in range(0, flat.size, _SLICE):
        yield flat[at : at + _SLICE]


def _as_hf(values: F32, name: str, arch: str, config: dict[str, Any]) -> F32:
    """The tensor as HuggingFace orders and offsets it."""
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        # [head][pair][half] back to [head][half][pair]
        split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
    if arch == "gemma3" and name.endswith("norm.weight"):
        return values - np.float32(1.0)
    return values


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
