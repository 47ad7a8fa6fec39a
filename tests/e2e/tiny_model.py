"""A model of two layers that is ready in a moment and whose every token depends on all KV: for kills and overload."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.api import tiny

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 64, 2, 4, 2, 16, 128
# Attention that looks at a few tokens hard, and layers that outweigh the embedding of the last token: a KV block that
# is missing, stale or another prompt's changes the text at once.
SCALE, SHARP = 0.25, 0.6


def write(directory: Path) -> Path:
    """Writes the model in HuggingFace form; its length limit is 1,024 tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.byte_level()
    vocab = len(json.loads(tokenizer)["model"]["vocab"]) + 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": tiny.EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": tiny.CHAT_TEMPLATE}))
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int, scale: float = SCALE) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "model.embed_tokens.weight": normal(vocab, HIDDEN, scale=0.5),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(vocab, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            name + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN, scale=SHARP),
            name + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            name + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
            name + "input_layernorm.weight": torch.ones(HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(weights, str(directory / "model.safetensors"))
    return directory
