"""config.json of every family, in both forms, and what must be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pd_serve.errors import ModelError
from pd_serve.kv.layout import LayerGroup
from pd_serve.models.config import ModelConfig, fingerprint
from pd_serve.models.rope_config import RopeConfig
from tests.models.reference import LLAMA3, SIZES, make_tiny


def config(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **more}


def test_llama_defaults() -> None:
    raw = config("LlamaForCausalLM")
    del raw["num_key_value_heads"], raw["eos_token_id"]
    c = ModelConfig.from_dict(raw)
    assert (c.num_kv_heads, c.head_dim, c.attention_scale, c.eos_token_ids) == (4, 16, 0.25, (2,))
    assert c.ropes == (RopeConfig(16, 10_000.0),)
    assert c.layer_groups() == (LayerGroup((0, 1, 2), 4, 16, None),)
    assert not (c.qkv_bias or c.qk_norm or c.sandwich_norms or c.tie_word_embeddings)


@pytest.mark.parametrize(
    "form",
    [
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500_000.0, "rope_scaling": {**LLAMA3, "type": LLAMA3["rope_type"], "rope_type": None}},
    ],
)
def test_llama3_rope_in_both_forms(form: dict[str, Any]) -> None:
    (rope,) = ModelConfig.from_dict(config("LlamaForCausalLM", **form)).ropes
    assert rope == RopeConfig(16, 500_000.0, "llama3", 8.0, 64, 1.0, 4.0)


def test_mistral_slides_in_all_layers_or_none() -> None:
    assert ModelConfig.from_dict(config("MistralForCausalLM", sliding_window=32)).windows == (32, 32, 32)
    assert ModelConfig.from_dict(config("MistralForCausalLM", sliding_window=None)).windows == (None, None, None)


def test_qwen_slides_only_where_told() -> None:
    off = ModelConfig.from_dict(config("Qwen2ForCausalLM", sliding_window=32, use_sliding_window=False))
    assert off.windows == (None,) * 3
    assert (off.qkv_bias, off.output_bias) == (True, False)
    on = config("Qwen2ForCausalLM", sliding_window=32, use_sliding_window=True, max_window_layers=1)
    assert ModelConfig.from_dict(on).windows == (None, 32, 32)
    qwen3 = ModelConfig.from_dict(config("Qwen3ForCausalLM"))
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)


GEMMA3 = {"num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 16}
GEMMA3_FORMS: list[dict[str, Any]] = [
    {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
]


@pytest.mark.parametrize("form", GEMMA3_FORMS)
def test_gemma3_has_two_groups_and_two_ropes(form: dict[str, Any]) -> None:
    c = ModelConfig.from_dict(config("Gemma3ForCausalLM", **GEMMA3, **form))
    assert c.layer_groups() == (LayerGroup((0, 1, 2, 3, 4, 6), 2, 32, 8), LayerGroup((5,), 2, 32, None))
    assert c.layer_ropes == (0, 0, 0, 0, 0, 1, 0)
    assert c.ropes == (RopeConfig(32, 1e4), RopeConfig(32, 1e6, "linear", 8.0))
    assert (c.attention_scale, c.norm_offset, c.activation) == (0.25, 1.0, "gelu_tanh")
    assert c.sandwich_norms and c.scale_embeddings and c.tie_word_embeddings and c.qk_norm


def test_multimodal_gemma3_fills_in_what_its_file_leaves_out() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "eos_token_id": [1, 106]}
    c = ModelConfig.from_dict(raw)
    assert (c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim) == (262_208, 8, 4, 256)
    assert c.eos_token_ids == (1, 106)
    assert [i for i, window in enumerate(c.windows) if window is None] == [5, 11, 17, 23, 29]


def test_eos_ids_are_those_of_both_files() -> None:
    c = ModelConfig.from_dict(config("LlamaForCausalLM"), {"eos_token_id": [7, 2]})
    assert c.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "no architecture"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict({**config("LlamaForCausalLM"), **change})


def test_an_unsupported_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM.*Gemma3ForCausalLM"):
        ModelConfig.from_dict({"architectures": ["MambaForCausalLM"]})


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_broken_config_json_is_a_model_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_fingerprint_sees_weights_config_and_dtype_but_not_place_or_writer(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    make_tiny("llama", first)
    shutil.copytree(first, second)
    raw = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**raw, "transformers_version": "9.9", "_name_or_path": "x"}))
    same = fingerprint(first, "float32")
    assert fingerprint(second, "float32") == same
    assert len(same) == 16
    assert len({same, fingerprint(first, "bfloat16"), fingerprint(first, "float32", "dummy")}) == 3

    (second / "config.json").write_text(json.dumps({**raw, "rope_theta": 1.0}))
    assert fingerprint(second, "float32") != same
    shutil.copy(first / "config.json", second)
    weights = second / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(bytes(data[:-4]))  # shorter
    assert fingerprint(second, "float32") != same
    data = bytearray((first / "model.safetensors").read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # one bit of the first value
    weights.write_bytes(bytes(data))
    assert fingerprint(second, "float32") != same


def test_configuration_needs_no_torch() -> None:
    """The node process reads it, and must start fast."""
    code = "import sys, pd_serve.models.config, pd_serve.models.source; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "set()"
