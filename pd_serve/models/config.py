"""What a model is, read from its ``config.json``: shapes, layers, rope, norms. No torch here.

Owns the translation of HuggingFace's configuration files (the forms of transformers 4 and 5) into one frozen
:class:`ModelConfig`, and the fingerprint by which two nodes see that they serve the same weights. Called by the
node process (Hello, limits), the engine (layout, decoder) and the handshake. Must never guess: an architecture
or a feature that the decoder does not compute is a ``ModelError`` that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_serve.errors import ModelError
from pd_serve.kv.layout import LayerGroup
from pd_serve.models.rope_config import RopeConfig, parse_rope

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}

# transformers fills these in when a config.json leaves them out (the multimodal Gemma 3 files leave out most)
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma3": _GEMMA3_DEFAULTS,
}
# keys that say how a file was written, not what the model computes
_NOT_IDENTITY = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
_SAMPLED_RANGES, _SAMPLE_BYTES = 8, 4096


@dataclass(frozen=True)
class ModelConfig:
    """Everything the engine needs to know of a model. Sizes are counts; ``windows`` are tokens."""

    architecture: str
    family: str  # llama, mistral, qwen2, qwen3, gemma3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_scale: float  # multiplies q @ k.T
    windows: tuple[int | None, ...]  # a layer: tokens it attends to, itself included; None = all
    ropes: tuple[RopeConfig, ...]  # the distinct rotary embeddings
    layer_ropes: tuple[int, ...]  # a layer: its index in ``ropes``
    activation: str = "silu"  # silu, gelu_tanh
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # added to norm weights at load (Gemma stores w of 1 + w)
    sandwich_norms: bool = False  # Gemma: attention's and MLP's outputs are normed too
    scale_embeddings: bool = False  # Gemma: by sqrt(hidden size), rounded to the dtype
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Reads ``config.json`` and, where it exists, ``generation_config.json`` (its EOS ids count too)."""
        generation = directory / "generation_config.json"
        return cls.from_dict(
            read_json(directory / "config.json"), read_json(generation) if generation.exists() else None
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """From the contents of ``config.json``. Raises ``ModelError`` for what pd-serve cannot compute."""
        architecture = _architecture(raw)
        family = ARCHITECTURES[architecture]
        if family == "gemma3" and isinstance(raw.get("text_config"), Mapping):
            raw = {**_top_level_ids(raw), **raw["text_config"]}
        c = {**_DEFAULTS[family], **raw}
        _refuse_unsupported(c, architecture)

        num_layers, num_heads = _int(c, "num_hidden_layers"), _int(c, "num_attention_heads")
        hidden_size = _int(c, "hidden_size")
        num_kv_heads = num_heads if c.get("num_key_value_heads") is None else _int(c, "num_key_value_heads")
        head_dim = hidden_size // num_heads if c.get("head_dim") is None else _int(c, "head_dim")
        if num_heads % num_kv_heads:
            raise ModelError(f"config.json: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly.")
        gemma = family == "gemma3"
        attention_bias = bool(c.get("attention_bias", False))
        kinds = _layer_kinds(c, family, num_layers)
        window = _int(c, "sliding_window") if "sliding_attention" in kinds else None
        ropes, layer_ropes = _ropes(c, family, kinds, head_dim)
        query_scalar = float(c["query_pre_attn_scalar"]) if gemma else float(head_dim)
        return cls(
            architecture=architecture,
            family=family,
            vocab_size=_int(c, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_int(c, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_int(c, "max_position_embeddings"),
            rms_norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            attention_scale=query_scalar**-0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            ropes=ropes,
            layer_ropes=layer_ropes,
            activation=_activation(c),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family != "qwen2",
            mlp_bias=bool(c.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "gemma3"),
            norm_offset=1.0 if gemma else 0.0,
            sandwich_norms=gemma,
            scale_embeddings=gemma,
            logit_softcap=c.get("final_logit_softcapping"),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            bos_token_id=c.get("bos_token_id"),
            pad_token_id=c.get("pad_token_id"),
            eos_token_ids=_eos_ids(c, generation),
        )

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers that remember the same span share block tables; groups in the order of their first layer."""
        spans: dict[int | None, list[int]] = {}
        for layer, window in enumerate(self.windows):
            spans.setdefault(window, []).append(layer)
        return tuple(
            LayerGroup(tuple(layers), self.num_kv_heads, self.head_dim, window) for window, layers in spans.items()
        )


def fingerprint(directory: Path, dtype: str, load_format: str = "safetensors") -> str:
    """16 hex digits that two nodes must share to exchange KV: configuration, weights and dtype.

    Weights are known by each file's name, size, safetensors header and a few sampled ranges, so that it takes
    milliseconds however large they are. With ``dummy`` weights the configuration alone counts, files or not.
    """
    config = {k: v for k, v in read_json(directory / "config.json").items() if k not in _NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps([dtype, load_format == "dummy", config], sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")) if load_format != "dummy" else ():
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header = min(int.from_bytes(file.read(8), "little"), size)
            digest.update(file.read(header))
            for i in range(_SAMPLED_RANGES):
                file.seek(8 + header + (size - 8 - header) * i // _SAMPLED_RANGES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a model's file; ``ModelError`` when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: give a HuggingFace model directory.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    what = ", ".join(map(str, names)) or f"no architecture (model_type {raw.get('model_type')!r})"
    raise ModelError(f"config.json names {what}; pd-serve supports {', '.join(ARCHITECTURES)}.")


def _top_level_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return {k: raw[k] for k in keys if raw.get(k) is not None}


def _refuse_unsupported(c: Mapping[str, Any], architecture: str) -> None:
    refused = {
        "quantization_config": "quantized weights",
        "attn_logit_softcapping": "soft-capped attention scores",
        "use_bidirectional_attention": "bidirectional attention",
    }
    for key, what in refused.items():
        if c.get(key):
            raise ModelError(
                f"config.json sets {key}: {architecture} with {what} is not supported. Use a float32, bfloat16 or "
                "float16 checkpoint of a plain decoder, or a GGUF file."
            )
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json sets partial_rotary_factor: rotary embeddings of part of a head are unsupported.")


def _int(c: Mapping[str, Any], key: str) -> int:
    value = c.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive whole number, not {value!r}.")
    return value


def _activation(c: Mapping[str, Any]) -> str:
    name = c.get("hidden_activation") or c.get("hidden_act") or "silu"
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise ModelError(f"config.json: activation {name!r} is not supported; supported are {', '.join(known)}.")
    return known[name]


def _layer_kinds(c: Mapping[str, Any], family: str, num_layers: int) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer."""
    kinds = c.get("layer_types")
    if family in ("llama", "mistral"):
        kinds = ["sliding_attention" if c.get("sliding_window") and family == "mistral" else "full_attention"]
        kinds *= num_layers
    elif family in ("qwen2", "qwen3") and not (c.get("use_sliding_window") and c.get("sliding_window")):
        kinds = ["full_attention"] * num_layers
    elif kinds is None and family in ("qwen2", "qwen3"):
        full = c.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(num_layers)]
    elif kinds is None:
        pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers.")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"config.json: layers of type {', '.join(sorted(unknown))} are not supported.")
    return list(kinds)


def _ropes(
    c: Mapping[str, Any], family: str, kinds: list[str], head_dim: int
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The distinct rotary embeddings and each layer's index among them."""
    theta, positions = float(c.get("rope_theta", 10_000.0)), int(c["max_position_embeddings"])
    parameters, scaling = c.get("rope_parameters"), c.get("rope_scaling")
    if family != "gemma3":
        # where both forms are given, rope_scaling is the older name of the same thing
        return (parse_rope(parameters or scaling or {}, theta, head_dim, positions),), (0,) * len(kinds)
    by_kind = parameters if parameters and ("full_attention" in parameters or "sliding_attention" in parameters) else {}
    flat = parameters if parameters and not by_kind else scaling
    theirs = {
        "full_attention": (by_kind.get("full_attention") or flat or {}, theta),
        "sliding_attention": (
            by_kind.get("sliding_attention") or {},
            float(c.get("rope_local_base_freq", 10_000.0)),
        ),
    }
    used = list(dict.fromkeys(kinds))
    ropes = tuple(parse_rope(theirs[kind][0], theirs[kind][1], head_dim, positions) for kind in used)
    return ropes, tuple(used.index(kind) for kind in kinds)


def _eos_ids(c: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (c, generation or {}):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(int(i) for i in ids))
