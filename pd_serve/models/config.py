"""What a model is, read from its ``config.json``: shapes, layers, rope, norms. No torch here.

Owns the translation of HuggingFace's configuration files (the forms of transformers 4 and 5) into one frozen
:class:`ModelConfig`, and the fingerprint by which two nodes see that they serve the same weights. Called by the
node process (Hello, limits), the engine (layout, decoder) and the handshake. Must never guess: an architecture
or a feature that the decoder does not compute is a ``ModelError`` that names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pd_serve.errors import ConfigError, ModelError
from pd_serve.kv.layout import LayerGroup, kv_group
from pd_serve.models.end_tokens import tokenizer_end_ids
from pd_serve.models.fields import flag, mapping, number, token_ids, whole
from pd_serve.models.quantization import BLOCK, Quantization
from pd_serve.models.quantization import parse as parse_quantization
from pd_serve.models.rope_config import RopeConfig, parse_rope, scaled_positions

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
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
    "eos_token_id": 1,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": {"eos_token_id": 2, "sliding_window": 4096, "max_position_embeddings": 131_072},
    "qwen2": {"max_position_embeddings": 32_768},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32_768},
    "qwen3_moe": {
        "max_position_embeddings": 32_768,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    "gemma3": _GEMMA3_DEFAULTS,
}
# config.json may leave out its architectures: what its model_type stands for
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
}
# null is a value of these, and not the same as a field left out
_NULLABLE = {"sliding_window", "head_dim", "eos_token_id"}
# keys that say how a file was written, not what the model computes
_NOT_IDENTITY = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_attn_implementation"}
_SAMPLED_RANGES, _SAMPLE_BYTES = 8, 4096
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts that some layers have in place of one MLP."""

    count: int
    per_token: int
    intermediate_size: int  # of each
    normalise: bool  # the weights of a token's experts sum to 1
    layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """Everything the engine needs to know of a model. Sizes are counts; ``windows`` are tokens."""

    architecture: str
    family: str  # llama, mistral, qwen2, qwen3, qwen3_moe, gemma3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    max_model_len: int  # prompt and output, rope scaling counted
    default_model_len: int  # what is served unless a user asks for more: LongRoPE costs short prompts quality
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
    experts: ExpertsConfig | None = None
    quantization: Quantization | None = None
    eos_token_ids: tuple[int, ...] = ()
    rank: int = 0  # under tensor parallelism sizes are this rank's (:mod:`pd_serve.models.shard`)
    ranks: int = 1
    total_kv_heads: int = 0  # of the whole model, on a rank of several

    @property
    def head_rows(self) -> int:
        """Tokens whose logits this rank computes."""
        return self.vocab_size // (1 if self.vocab_size % self.ranks else self.ranks)

    @classmethod
    def from_directory(cls, directory: Path, chat_template: str = "") -> ModelConfig:
        """Reads ``config.json`` and what else names tokens that end a text: ``generation_config.json`` and the
        tokenizer's files. ``chat_template``: in place of the model's own."""
        raw = read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        ids = list(tokenizer_end_ids(directory, chat_template or None))
        if generation.exists():
            ids = [*token_ids(read_json(generation), "eos_token_id", "generation_config.json"), *ids]
        return cls.from_dict(raw, ids)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], end_ids: Sequence[int] = ()) -> ModelConfig:
        """From the contents of ``config.json``, and tokens that other files name as ends of a text. Raises
        ``ModelError`` for what pd-serve cannot compute."""
        # long: a line a field
        architecture = _architecture(raw)
        family = ARCHITECTURES[architecture]
        eos = token_ids(raw, "eos_token_id")
        if family == "gemma3" and raw.get("text_config") is not None:
            text = mapping(raw, "text_config")
            eos = (*eos, *token_ids(text, "eos_token_id"))
            raw = {**_top_level(raw), **text}
        c = {**_DEFAULTS[family], **{k: v for k, v in raw.items() if v is not None or k in _NULLABLE}}
        _refuse_unsupported(c, architecture)

        num_layers, num_heads = whole(c, "num_hidden_layers"), whole(c, "num_attention_heads")
        if num_layers > _MOST_LAYERS:
            raise ModelError(
                f"config.json: num_hidden_layers is {num_layers}, more than the {_MOST_LAYERS} of any model."
            )
        hidden_size = whole(c, "hidden_size")
        num_kv_heads = num_heads if c.get("num_key_value_heads") is None else whole(c, "num_key_value_heads")
        head_dim = hidden_size // num_heads if c.get("head_dim") is None else whole(c, "head_dim")
        if head_dim < 2 or head_dim % 2:
            raise ModelError(f"config.json: a head size of {head_dim} has no halves to rotate; it must be even.")
        if num_heads % num_kv_heads:
            raise ModelError(f"config.json: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly.")
        gemma = family == "gemma3"
        attention_bias = flag(c, "attention_bias")
        kinds = _layer_kinds(c, family, num_layers)
        window = whole(c, "sliding_window") if "sliding_attention" in kinds else None
        ropes, layer_ropes = _ropes(c, family, kinds, head_dim)
        query_scalar = number(c, "query_pre_attn_scalar", 256.0) if gemma else float(head_dim)
        positions, vocab_size = whole(c, "max_position_embeddings"), whole(c, "vocab_size")
        # Gemma 3's max_position_embeddings counts the scaling of its global layers already
        longest = positions if gemma else scaled_positions(ropes[0], positions)
        return cls(
            architecture=architecture,
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=whole(c, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            max_model_len=longest,
            default_model_len=min(
                longest, *(rope.original_positions for rope in ropes if rope.kind == "longrope"), longest
            ),
            rms_norm_eps=number(c, "rms_norm_eps", 1e-6),
            attention_scale=query_scalar**-0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            ropes=ropes,
            layer_ropes=layer_ropes,
            activation=_activation(c),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family != "qwen2",
            mlp_bias=flag(c, "mlp_bias"),
            qk_norm=family in ("qwen3", "qwen3_moe", "gemma3"),
            norm_offset=1.0 if gemma else 0.0,
            sandwich_norms=gemma,
            scale_embeddings=gemma,
            logit_softcap=number(c, "final_logit_softcapping", 0.0) or None,
            tie_word_embeddings=flag(c, "tie_word_embeddings"),
            experts=_experts(c, num_layers) if family == "qwen3_moe" else None,
            quantization=parse_quantization(c),
            eos_token_ids=_end_ids([*(eos or token_ids(c, "eos_token_id")), *end_ids], vocab_size),
        )

    def for_length(self, max_model_len: int) -> ModelConfig:
        """The model as it is computed where sequences have up to so many tokens."""
        return replace(self, ropes=tuple(rope.for_length(max_model_len) for rope in self.ropes))

    def for_rank(self, rank: int, ranks: int) -> ModelConfig:
        """The model as this rank computes it, which has its part of heads and of MLPs. Raises ConfigError where it
        cannot be dealt evenly. Where there are fewer KV heads than ranks, ranks next to each other have the same one.
        """
        if ranks == 1:
            return self
        experts = self.experts
        sizes = {"KV heads": self.num_kv_heads, "attention heads": self.num_heads}
        if experts is None or len(experts.layers) < self.num_layers:
            sizes["intermediate size"] = self.intermediate_size
        if experts is not None:
            sizes["intermediate size of experts"] = experts.intermediate_size
        for what, size in sizes.items():
            dealt = min(size, ranks) if what == "KV heads" else ranks
            if size % dealt or ranks % dealt:
                raise ConfigError(f"--tp {ranks} does not divide the model's {what}, {size}")
            rows = size * self.head_dim if "heads" in what else size
            if self.quantization is not None and self.quantization.blocks and rows // dealt % BLOCK:
                raise ConfigError(f"--tp {ranks} would cut FP8 blocks of {BLOCK} rows in two ({what}: {size})")
        return replace(
            self,
            rank=rank,
            ranks=ranks,
            num_heads=self.num_heads // ranks,
            num_kv_heads=max(1, self.num_kv_heads // ranks),
            total_kv_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size // ranks,
            experts=experts and replace(experts, intermediate_size=experts.intermediate_size // ranks),
        )

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers that remember the same span share block tables; groups in the order of their first layer."""
        spans: dict[int | None, list[int]] = {}
        for layer, window in enumerate(self.windows):
            spans.setdefault(window, []).append(layer)
        heads, total = self.num_kv_heads, self.total_kv_heads
        first = self.rank * total // self.ranks
        return tuple(
            kv_group(tuple(layers), heads, self.head_dim, window, first, total) for window, layers in spans.items()
        )


def fingerprint(directory: Path, dtype: str, load_format: str = "safetensors", *, long_rope: bool = False) -> str:
    """16 hex digits that two nodes must share to exchange KV: configuration, weights and dtype.

    Weights are known by each file's name, size, safetensors header and a few sampled ranges, so that it takes
    milliseconds however large they are. With ``dummy`` weights the configuration alone counts, files or not.
    ``long_rope``: LongRoPE's factors for long sequences are used, with which the same tokens have other keys.
    """
    config = {k: v for k, v in read_json(directory / "config.json").items() if k not in _NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps([dtype, load_format == "dummy", config], sort_keys=True).encode())
    if long_rope:
        digest.update(b"long rope")
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
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _architecture(raw: Mapping[str, Any]) -> str:
    value, model_type = raw.get("architectures") or [], raw.get("model_type")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures must be a list of names, not {value!r:.80}.")
    if not names and isinstance(model_type, str) and model_type in _MODEL_TYPES:
        return _MODEL_TYPES[model_type]
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    what = ", ".join(names) or f"no architecture (model_type {model_type!r:.80})"
    raise ModelError(f"config.json names {what}; pd-serve supports {', '.join(ARCHITECTURES)}.")


def _top_level(raw: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("eos_token_id", "tie_word_embeddings", "quantization_config")
    return {k: raw[k] for k in keys if raw.get(k) is not None}


def _refuse_unsupported(c: Mapping[str, Any], architecture: str) -> None:
    refused = {
        "attn_logit_softcapping": "soft-capped attention scores",
        "use_bidirectional_attention": "bidirectional attention",
    }
    for key, what in refused.items():
        if c.get(key):
            raise ModelError(
                f"config.json sets {key}: {architecture} with {what} is not supported. Use a float32, bfloat16 or "
                "float16 checkpoint of a plain decoder, or a GGUF file."
            )
    if number(c, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json sets partial_rotary_factor: rotary embeddings of part of a head are unsupported.")


def _activation(c: Mapping[str, Any]) -> str:
    name = c.get("hidden_activation") or c.get("hidden_act") or "silu"
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(name, str) or name not in known:
        raise ModelError(f"config.json: activation {name!r:.80} is not supported; supported are {', '.join(known)}.")
    return known[name]


def _layer_kinds(c: Mapping[str, Any], family: str, num_layers: int) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer."""
    kinds = c.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ModelError("config.json: layer_types must be a list of names.")
    if family in ("llama", "mistral", "qwen3_moe"):
        slides = family == "mistral" or (family == "qwen3_moe" and flag(c, "use_sliding_window"))
        kinds = ["sliding_attention" if c.get("sliding_window") and slides else "full_attention"] * num_layers
    elif family in ("qwen2", "qwen3") and not (c.get("use_sliding_window") and c.get("sliding_window")):
        kinds = ["full_attention"] * num_layers
    elif kinds is None and family in ("qwen2", "qwen3"):
        full = whole({"max_window_layers": 28, **c}, "max_window_layers") if c.get("max_window_layers") != 0 else 0
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(num_layers)]
    elif kinds is None:
        name = "sliding_window_pattern" if c.get("sliding_window_pattern") else "_sliding_window_pattern"
        pattern = whole(c, name) if c.get(name) else 6
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers.")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"config.json: layers of type {', '.join(sorted(unknown))} are not supported.")
    return list(kinds)


def _experts(c: Mapping[str, Any], num_layers: int) -> ExpertsConfig:
    """``num_local_experts``: what transformers 5 calls ``num_experts``."""
    count = whole(c, "num_local_experts" if c.get("num_experts") is None else "num_experts")
    per_token, every = whole(c, "num_experts_per_tok"), whole(c, "decoder_sparse_step")
    if per_token > count:
        raise ModelError(f"config.json: a token cannot have {per_token} of {count} experts.")
    plain = c.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        raise ModelError("config.json: mlp_only_layers must be a list of numbers of layers.")
    layers = frozenset(range(every - 1, num_layers, every)) - frozenset(plain)
    return ExpertsConfig(count, per_token, whole(c, "moe_intermediate_size"), flag(c, "norm_topk_prob"), layers)


def _ropes(
    c: Mapping[str, Any], family: str, kinds: list[str], head_dim: int
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The distinct rotary embeddings and each layer's index among them."""
    theta, positions = number(c, "rope_theta", 10_000.0), whole(c, "max_position_embeddings")
    parameters, scaling = mapping(c, "rope_parameters"), mapping(c, "rope_scaling")
    if family != "gemma3":
        key = "original_max_position_embeddings"
        original = whole(c, key) if c.get(key) is not None else None
        # where both forms are given, rope_scaling is the older name of the same thing
        return (parse_rope(parameters or scaling, theta, head_dim, positions, original),), (0,) * len(kinds)
    by_kind = parameters if {"full_attention", "sliding_attention"} & parameters.keys() else {}
    flat = parameters if parameters and not by_kind else scaling
    theirs = {
        "full_attention": (mapping(by_kind, "full_attention") or flat, theta),
        "sliding_attention": (
            mapping(by_kind, "sliding_attention"),
            number(c, "rope_local_base_freq", 10_000.0),
        ),
    }
    used = list(dict.fromkeys(kinds))
    ropes = tuple(parse_rope(theirs[kind][0], theirs[kind][1], head_dim, positions) for kind in used)
    return ropes, tuple(used.index(kind) for kind in kinds)


def _end_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Each once, and only those that can be sampled."""
    beyond = sorted({i for i in ids if i >= vocab_size})
    if beyond:
        log.warning(
            "the model's files name %s as end of text, beyond its vocabulary of %d; ignored", beyond, vocab_size
        )
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))
