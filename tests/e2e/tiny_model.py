"""Models that are ready in a moment and whose every token depends on all KV: for kills, overload and same texts.

Real ones are for what only real ones show: that the text is transformers', and what a newcomer sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.api import tiny


@dataclass(frozen=True)
class Size:
    """``length``: the most tokens of a prompt and its answer. ``experts``: of which a token goes to a quarter."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    length: int
    experts: int = 0  # 0: one MLP

    @property
    def block_bytes(self) -> int:
        """Of a KV block of 16 tokens in float32."""
        return 16 * 2 * self.layers * self.kv_heads * self.head_dim * 4


TINY = Size(64, 2, 4, 2, 16, 128, 1024)  # a step in about a millisecond
SMALL = Size(576, 2, 9, 3, 64, 1536, 8192)  # layers of SmolLM2-135M's shape, two of its thirty
SPARSE = Size(64, 3, 4, 2, 16, 48, 4096, experts=16)
# Attention that looks at a few tokens hard, and layers that outweigh the embedding of the last token: a KV block that
# is missing, stale or another prompt's changes the text at once.
SCALE, SHARP = 0.25, 0.6


def write(directory: Path, size: Size = TINY) -> Path:
    """Writes a model in HuggingFace form; a token of it is about a byte."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.byte_level()
    vocab = len(json.loads(tokenizer)["model"]["vocab"]) + 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.length,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": tiny.EOS,
    }
    if size.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": size.experts,
            "num_experts_per_tok": size.experts // 4,
            "moe_intermediate_size": size.intermediate,
            "norm_topk_prob": True,
        }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": tiny.CHAT_TEMPLATE}))
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int, scale: float = SCALE) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (scale * (TINY.hidden / size.hidden) ** 0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, size.hidden, generator=generator) * 0.5,
        "model.norm.weight": torch.ones(size.hidden),
        "lm_head.weight": normal(vocab, size.hidden),
    }
    for layer in range(size.layers):
        name = f"model.layers.{layer}."
        weights |= {
            name + "self_attn.q_proj.weight": normal(size.heads * size.head_dim, size.hidden, scale=SHARP),
            name + "self_attn.k_proj.weight": normal(size.kv_heads * size.head_dim, size.hidden),
            name + "self_attn.v_proj.weight": normal(size.kv_heads * size.head_dim, size.hidden),
            name + "self_attn.o_proj.weight": normal(size.hidden, size.heads * size.head_dim),
            name + "input_layernorm.weight": torch.ones(size.hidden),
            name + "post_attention_layernorm.weight": torch.ones(size.hidden),
        }
        for mlp in [f"{name}mlp.experts.{i}." for i in range(size.experts)] or [f"{name}mlp."]:
            weights |= {
                mlp + "gate_proj.weight": normal(size.intermediate, size.hidden),
                mlp + "up_proj.weight": normal(size.intermediate, size.hidden),
                mlp + "down_proj.weight": normal(size.hidden, size.intermediate),
            }
        if size.experts:
            weights |= {
                name + "mlp.gate.weight": normal(size.experts, size.hidden),
                name + "self_attn.q_norm.weight": torch.ones(size.head_dim),
                name + "self_attn.k_norm.weight": torch.ones(size.head_dim),
            }
    save_file(weights, str(directory / "model.safetensors"))
    return directory
