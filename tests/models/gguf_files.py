"""Writes GGUF files of tiny models, doing to the weights what llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_PARTS = {
    **PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(path: Path, model: Any, arch: str, *, pre: str = "smollm", **extra: Any) -> None:
    """``extra``: further metadata; a key ``rope_freqs`` is a tensor instead."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        write_sentencepiece(writer, config.vocab_size)
    else:
        write_byte_level(writer, config.vocab_size, pre)
    factors = extra.pop("rope_freqs", None)
    for key, value in extra.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        add_tensor(writer, name, tensor.float().numpy(), arch, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: GGUFWriter, name: str, values: npt.NDArray[np.float32], arch: str, config: Any) -> None:
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if arch == "gemma3" and "norm.weight" in name:
        values = values + 1
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        writer.add_tensor(f"{top[stem]}.{kind}", values)
        return
    _, _, layer, part = stem.split(".", 3)
    to = f"blk.{layer}.{(GEMMA3_PARTS if arch == 'gemma3' else PARTS)[part]}.{kind}"
    if part == "mlp.up_proj" and kind == "weight":  # one matrix quantised, as all are in real files
        q8 = GGMLQuantizationType.Q8_0
        writer.add_tensor(to, quantize(values, q8), raw_dtype=q8)
    else:
        writer.add_tensor(to, values)


def write_byte_level(writer: GGUFWriter, vocab_size: int, pre: str) -> None:
    tokens = ["<|endoftext|>", "<s>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "12"]
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
    tokens, types = [*tokens, "<tool>"], [*types, USER_DEFINED]
    while len(tokens) < vocab_size:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)


def write_sentencepiece(writer: GGUFWriter, vocab_size: int) -> None:
    pieces = ["▁", "t", "h", "e", "a", "1", "2", "th", "he", "the", "▁the", "12"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "  ", "\n\n", *pieces]
    types = [CONTROL] * 4 + [BYTE] * 256 + [USER_DEFINED] * 2 + [NORMAL] * len(pieces)
    while len(tokens) < vocab_size:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(CONTROL)
    # "he" before "th": the score decides, not the order in the list
    scores = [0.0 if token == "he" else -float(i) for i, token in enumerate(tokens)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for name, value in (("padding", 0), ("eos", 1), ("bos", 2), ("unknown", 3)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
