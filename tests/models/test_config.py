"""config.json of every family, in both forms, and what must be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.errors import ModelError
from pd_serve.kv.layout import kv_group
from pd_serve.models.config import ARCHITECTURES, ExpertsConfig, ModelConfig, fingerprint
from pd_serve.models.rope import inverse_frequencies
from pd_serve.models.rope_config import SUPPORTED, RopeConfig
from tests.models.reference import LLAMA3, SIZES, make_tiny


def config(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **more}


def test_llama_defaults() -> None:
    raw = config("LlamaForCausalLM")
    del raw["num_key_value_heads"], raw["eos_token_id"]
    c = ModelConfig.from_dict(raw)
    assert (c.num_kv_heads, c.head_dim, c.attention_scale, c.eos_token_ids) == (4, 16, 0.25, (2,))
    assert c.ropes == (RopeConfig(16, 10_000.0),)
    assert c.layer_groups() == (kv_group((0, 1, 2), 4, 16, None),)
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


QWEN3_MOE = {"num_experts": 8, "moe_intermediate_size": 40, "num_experts_per_tok": 3, "norm_topk_prob": True}


def test_experts() -> None:
    c = ModelConfig.from_dict(config("Qwen3MoeForCausalLM", **QWEN3_MOE, use_sliding_window=True, sliding_window=32))
    assert c.experts == ExpertsConfig(8, 3, 40, True, frozenset((0, 1, 2)))
    assert (c.qk_norm, c.windows) == (True, (32, 32, 32))
    newer = {**QWEN3_MOE, "num_local_experts": 9, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    del newer["num_experts"], newer["norm_topk_prob"]
    raw = {**config("Qwen3MoeForCausalLM"), **newer, "num_hidden_layers": 6, "use_sliding_window": False}
    c = ModelConfig.from_dict({**raw, "sliding_window": 32})
    assert c.experts == ExpertsConfig(9, 3, 40, False, frozenset((1, 5)))
    assert c.windows == (None,) * 6
    assert ModelConfig.from_dict(config("Qwen3ForCausalLM")).experts is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": None}, "num_local_experts"),
        ({"num_experts_per_tok": 9}, "9 of 8"),
        ({"mlp_only_layers": ["all"]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_experts_that_cannot_be_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict({**config("Qwen3MoeForCausalLM"), **QWEN3_MOE, **change})


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
    assert c.layer_groups() == (kv_group((0, 1, 2, 3, 4, 6), 2, 32, 8), kv_group((5,), 2, 32, None))
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


def test_eos_ids_are_those_of_all_that_name_them() -> None:
    c = ModelConfig.from_dict(config("LlamaForCausalLM", eos_token_id=[2, 5]), [7, 2, 9999])
    assert c.eos_token_ids == (2, 5, 7)
    text = {**SIZES, "eos_token_id": 106}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "eos_token_id": [1]}
    assert ModelConfig.from_dict(raw).eos_token_ids == (1, 106)
    assert ModelConfig.from_dict(config("LlamaForCausalLM", eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "no architecture"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"architectures": [], "model_type": "mamba"}, "mamba"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"head_dim": 7}, "even"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
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


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("absent", ["missing", "null", "empty"])
def test_architectures_follow_from_the_model_type(model_type: str, absent: str) -> None:
    raw = {**SIZES, "model_type": model_type, "architectures": None if absent == "null" else []}
    if absent == "missing":
        del raw["architectures"]
    raw |= QWEN3_MOE if model_type == "qwen3_moe" else {}
    assert ModelConfig.from_dict(raw).family == model_type.removesuffix("_text")


def test_null_is_what_transformers_would_have_put_there() -> None:
    keys = ("rope_theta", "rope_scaling", "attention_bias", "hidden_act", "rms_norm_eps", "max_position_embeddings")
    c = ModelConfig.from_dict(config("LlamaForCausalLM", **dict.fromkeys(keys)))
    assert (c.ropes[0].theta, c.max_position_embeddings, c.rms_norm_eps) == (10_000.0, 2048, 1e-6)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("scaling", "longest", "default"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 1024, 1024),
        ({"type": "dynamic", "factor": 2.5}, 640, 640),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 1024, 1024),  # of max_position_embeddings
        (LLAMA3, 256, 256),
        ({**LONGROPE, "original_max_position_embeddings": 128}, 256, 128),
        ({**LONGROPE, "rope_type": None, "type": "su", "original_max_position_embeddings": 128}, 256, 128),
    ],
)
def test_context_length_is_what_vllm_derives(scaling: dict[str, Any], longest: int, default: int) -> None:
    c = ModelConfig.from_dict(config("LlamaForCausalLM", rope_scaling=scaling))
    assert (c.max_model_len, c.default_model_len) == (longest, default)
    gemma = {"rope_type": "linear", "factor": 8.0}
    c = ModelConfig.from_dict(config("Gemma3ForCausalLM", **GEMMA3, rope_scaling=gemma))
    assert c.max_model_len == 256  # counted already


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(), st.sampled_from(["", "linear", "null"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["factor", "rope_type"]), inner),
    max_leaves=4,
)
_KEYS = [
    *SIZES, "architectures", "model_type", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "layer_types", "sliding_window", "max_window_layers", "use_sliding_window", "sliding_window_pattern", "hidden_act",
    "text_config", "attention_bias", "tie_word_embeddings", "final_logit_softcapping", "query_pre_attn_scalar",
    "partial_rotary_factor", "original_max_position_embeddings", "rope_local_base_freq", "num_experts",
    "num_experts_per_tok", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
]  # fmt: skip
_ROPE_KEYS = [
    "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
]  # fmt: skip


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    change=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4),
    kind=st.sampled_from([None, *SUPPORTED]),
    rope=st.dictionaries(st.sampled_from(_ROPE_KEYS), st.one_of(_JSON, st.floats(0.1, 100)), max_size=5),
)
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_model_or_a_model_error(
    architecture: str, change: dict[str, Any], kind: str | None, rope: dict[str, Any]
) -> None:
    scaling = {} if kind is None else {"rope_scaling": {**LONGROPE, **LLAMA3, "rope_type": kind, **rope}}
    try:
        c = ModelConfig.from_dict({**config(architecture), "num_experts": 8, **scaling, **change})
        c.layer_groups() if c.num_layers < 1000 else None
        frequencies, scale = inverse_frequencies(c.for_length(c.max_model_len).ropes[0])
    except ModelError:
        return
    assert frequencies.shape == (c.head_dim // 2,) and scale > 0


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
    others = [fingerprint(first, "bfloat16"), fingerprint(first, "float32", "dummy")]
    others.append(fingerprint(first, "float32", long_rope=True))
    assert len({same, *others}) == 4

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
