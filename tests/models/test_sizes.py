"""How long sequences may be and whether a model fits, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pd_serve import up
from pd_serve.config import NodeConfig, UpConfig
from pd_serve.errors import ConfigError
from pd_serve.models.config import ModelConfig
from pd_serve.models.sizes import _kv_dtype, _max_model_len, sizes, weight_numbers
from tests.e2e import tiny_model
from tests.models.reference import LONGROPE, SIZES


def limit(asked: int, capacity: int, **more: object) -> int:
    model = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **SIZES, **more})
    config = NodeConfig(role="decode", max_model_len=asked)
    return _max_model_len(config, model, capacity)


def test_a_length_that_cannot_be_had_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"257 .*the model takes, 256 tokens.*--max-model-len"):
        limit(257, 10_000)
    with pytest.raises(ConfigError, match=r"200 does not fit.*100 tokens.*--kv-cache-memory"):
        limit(200, 100)
    assert (limit(256, 10_000), limit(100, 100), limit(0, 10_000), limit(0, 100)) == (256, 100, 256, 100)
    assert limit(1000, 1000, rope_scaling={"type": "linear", "factor": 4.0}) == 1000


def test_longrope_serves_its_original_context_unless_more_is_asked_for() -> None:
    assert (limit(0, 10_000, rope_scaling=LONGROPE), limit(256, 10_000, rope_scaling=LONGROPE)) == (64, 256)


KV_SCHEME = {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "static"}}


@pytest.mark.parametrize(
    ("asked", "dtype", "config", "expected"),
    [
        ("auto", "bfloat16", {}, "bfloat16"),
        ("auto", "float32", {"quantization_config": {"quant_method": "fp8"}}, "float32"),
        ("auto", "bfloat16", KV_SCHEME, "float8_e4m3fn"),
        ("fp8", "float32", {}, "float8_e4m3fn"),
        ("fp8_e4m3", "bfloat16", {}, "float8_e4m3fn"),
        ("bfloat16", "bfloat16", KV_SCHEME, "bfloat16"),
    ],
)
def test_the_format_of_k_and_v(asked: str, dtype: str, config: dict[str, object], expected: str) -> None:
    model = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **SIZES, **config})
    assert _kv_dtype(NodeConfig(role="decode", dtype=dtype, kv_cache_dtype=asked), model) == expected


def test_a_format_of_k_and_v_that_is_not_that_of_activations_is_refused() -> None:
    model = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **SIZES})
    with pytest.raises(ConfigError, match="--kv-cache-dtype bfloat16 does not go with --dtype float32"):
        _kv_dtype(NodeConfig(role="decode", dtype="float32", kv_cache_dtype="bfloat16"), model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"kv_cache_memory": 1024}, "--kv-cache-memory to at least"), ({"max_model_len": 5000}, "lower --max-model-len")],
)
def test_up_says_what_does_not_fit_before_it_starts_anything(
    tmp_path: Path, settings: dict[str, int], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=said):
        up.run(UpConfig(model=str(tiny_model.write(tmp_path)), **settings))  # type: ignore[arg-type]
    assert "Starting" not in capfd.readouterr().out


def test_a_model_that_does_not_fit_is_refused_with_what_there_is(tmp_path: Path) -> None:
    directory = tiny_model.write(tmp_path / "m", tiny_model.SMALL)
    held = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 4
    assert weight_numbers(ModelConfig.from_directory(directory)) == pytest.approx(held, rel=0.05)
    settings = NodeConfig(
        role="decode", model=str(directory), device="cpu", dtype="float32", kv_cache_memory=64 << 20, max_model_len=64
    )
    sizes(settings, directory, "")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1, "hidden_size": 4096}))
    with pytest.raises(ConfigError, match=r"--model .* weights are .*TiB in float32, --kv-cache-memory .*--dtype bf"):
        sizes(settings, directory, "")
    sizes(dataclasses.replace(settings, device="cuda"), directory, "")  # a GPU's memory is measured at the start
