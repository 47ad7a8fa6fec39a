"""What the decoder is compared with: transformers' models, tiny ones of every family and the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pd_serve.compute.cpu import ops
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Attention, HeadTransform

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, **more})


def _mistral(**more: Any) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SIZES, **more)


def _qwen2(**more: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**SIZES, **more)


def _qwen3(**more: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**{**SIZES, "head_dim": 32, **more})


def _qwen3_moe(**more: Any) -> Any:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
    return Qwen3MoeConfig(**{**SIZES, "head_dim": 32, **experts, **more})


def _gemma3(**more: Any) -> Any:
    from transformers import Gemma3TextConfig

    sizes = {**SIZES, "num_hidden_layers": 7}
    return Gemma3TextConfig(**sizes, head_dim=32, sliding_window=8, query_pre_attn_scalar=24, **more)


# every family, and within a family every feature that changes what is computed
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-tied-eps": lambda: _llama(tie_word_embeddings=True, rms_norm_eps=1e-2),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: _llama(head_dim=24),
    "llama-head-dim-10": lambda: _llama(head_dim=10),
    "qwen3-head-dim-12": lambda: _qwen3(head_dim=12),
    "llama3-rope": lambda: _llama(rope_parameters=LLAMA3),
    "llama-linear-rope": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    "llama-yarn": lambda: _llama(rope_parameters=YARN),
    "llama-longrope": lambda: _llama(rope_parameters={**LONGROPE, "attention_factor": 1.0}),
    "llama-dynamic": lambda: _llama(
        max_position_embeddings=50, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "mistral-sliding": lambda: _mistral(sliding_window=8),
    "mistral": lambda: _mistral(sliding_window=None),
    "qwen2": _qwen2,
    "qwen2-sliding": lambda: _qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": _qwen3,
    "qwen3-biases": lambda: _qwen3(attention_bias=True, tie_word_embeddings=True),
    "qwen3-moe": _qwen3_moe,
    "qwen3-moe-shares": lambda: _qwen3_moe(norm_topk_prob=False, attention_bias=True),
    "qwen3-moe-step": lambda: _qwen3_moe(decoder_sparse_step=2),
    "qwen3-moe-mlp-only": lambda: _qwen3_moe(mlp_only_layers=[0, 2], use_sliding_window=True, sliding_window=8),
    "gemma3": _gemma3,
    "gemma3-softcap": lambda: _gemma3(final_logit_softcapping=0.5),
}


def make_tiny(family: str, directory: Path, changes: dict[str, Any] | None = None, **save: Any) -> Any:
    """A tiny model with random weights, saved to ``directory``; returns transformers' model.

    ``changes``: what its configuration has otherwise.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(changes or {})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases too, or a model that forgets them looks right
            parameter.normal_(0.0 if "norm" not in name or "gemma" in family else 1.0, 0.3)
    model.save_pretrained(directory, **save)
    return model


def dense_attention(config: ModelConfig) -> Attention:
    """Attention of one whole sequence over itself."""
    mix = mixer(config)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform) -> Tensor:
        return mix(layer, *ops.transform_heads(q, k, positions, transform), v)

    return attend


def mixer(config: ModelConfig) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """The same of heads that are transformed already, written for reading."""

    def mix(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = config.num_heads // config.num_kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        row, column = torch.arange(len(q))[:, None], torch.arange(len(q))[None, :]
        seen = column <= row
        if (window := config.windows[layer]) is not None:
            seen &= column > row - window
        scores = torch.einsum("qhd,khd->hqk", q, k) * config.attention_scale
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1)

    return mix


def load(directory: Path, dtype: str = "float32") -> Decoder:
    config = ModelConfig.from_directory(directory)
    length = config.max_model_len
    return load_decoder(directory, config.for_length(length), dtype, ops=ops, max_positions=length)


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """``[T] -> [T, vocab]``: one sequence in one forward pass."""
    hidden = decoder.forward(tokens, torch.arange(len(tokens)), dense_attention(decoder.config))
    return decoder.logits(hidden)


@torch.inference_mode()
def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens[None]).logits[0].float()
    return result
