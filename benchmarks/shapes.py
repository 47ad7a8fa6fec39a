"""The models that GPUs are measured with: shapes, for made-up weights."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "eos_token_id": 128001, "torch_dtype": "bfloat16", "num_hidden_layers": 32,
}  # fmt: skip
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "eos_token_id": 151645, "torch_dtype": "bfloat16", "num_hidden_layers": 48,
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {"llama-3.1-8b": LLAMA, "qwen3-30b-a3b": QWEN3_MOE}
_NOT = ["lm_head", "mlp.gate"]
_SCALES = {"num_bits": 8, "type": "float", "symmetric": True}
_ROWS = {
    "targets": ["Linear"],
    "weights": {**_SCALES, "strategy": "channel", "dynamic": False},
    "input_activations": {**_SCALES, "strategy": "token", "dynamic": True},
}
# how weights are quantised, as config.json says it
WEIGHTS: dict[str, dict[str, object] | None] = {
    "bfloat16": None,
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": _NOT},
    "fp8-rows": {"quant_method": "compressed-tensors", "config_groups": {"0": _ROWS}, "ignore": _NOT},
    "fp8-blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": _NOT},
}


def write_model(folder: Path, layers: int) -> Path:
    """Llama-3.1-8B's shape without weights, and with a tokenizer that only names ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers, "bos_token_id": 128000}))
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<t{i}>": i for i in range(len(vocabulary), 128256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
