"""Conversion of GGUF files: nothing lost, nothing permuted, nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pd_serve.errors import ModelError
from pd_serve.models.config import ModelConfig
from pd_serve.models.gguf import convert, to_bfloat16
from pd_serve.models.gguf_reader import GGUFFile
from pd_serve.models.rope import inverse_frequencies
from pd_serve.models.rope_config import parse_rope
from pd_serve.paths import cache_directory
from tests.models import reference
from tests.models.gguf_files import write_gguf

TOKENS = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1))


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def converted(path: Path, dtype: str = "float32") -> Path:
    directory = path.with_name(f"{path.stem}-{dtype}")
    directory.mkdir()
    convert(path, directory, dtype, quiet)
    return directory


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("llama", "llama"),
        ("llama-tied-eps", "llama"),
        ("llama-biases", "llama"),
        ("llama-head-dim", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3"),
    ],
)
def test_round_trip_gives_the_model_back(family: str, arch: str, tmp_path: Path) -> None:
    model = reference.make_tiny(family, tmp_path / "hf")
    if arch == "gemma3":  # the file does not say it; what reads it takes the head's size
        model.config.query_pre_attn_scalar = 32
        for layer in model.model.layers:
            layer.self_attn.scaling = 32**-0.5
    write_gguf(tmp_path / "tiny.gguf", model, arch)
    directory = converted(tmp_path / "tiny.gguf")

    expected, found = load_file(tmp_path / "hf" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        loss = 0.02 if "up_proj.weight" in name else 3e-7  # Q8_0; Gemma's norms went through w + 1
        torch.testing.assert_close(found[name], tensor, atol=loss, rtol=0, msg=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj.weight" in name:
                parameter.copy_(found[name])
    logits = reference.logits(reference.load(directory), TOKENS)
    torch.testing.assert_close(logits, reference.reference_logits(model, TOKENS), atol=1e-4, rtol=1e-5)


def test_llama3_rope_factors_become_their_parameters(tmp_path: Path) -> None:
    parameters = {**reference.LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0}
    model = reference.make_tiny("llama", tmp_path / "hf")
    model.config.rope_parameters = parameters
    rope = parse_rope(parameters, 0.0, 16, 0)
    plain, _ = inverse_frequencies(parse_rope({}, 500_000.0, 16, 0))
    write_gguf(tmp_path / "a.gguf", model, "llama", rope_freqs=plain / inverse_frequencies(rope)[0])
    assert ModelConfig.from_directory(converted(tmp_path / "a.gguf")).ropes == (rope,)

    write_gguf(tmp_path / "b.gguf", model, "llama", rope_freqs=torch.linspace(1, 3, 8))
    with pytest.raises(ModelError, match="Llama 3"):
        converted(tmp_path / "b.gguf")


def test_newer_gemma3_files_flag_each_layer(tmp_path: Path) -> None:
    """Read as a list; the pattern of sixes is only what files without the key mean."""
    from pd_serve.models import gguf

    path = tmp_path / "a.gguf"
    write_gguf(path, reference.make_tiny("gemma3", tmp_path / "hf"), "gemma3")
    with GGUFFile(path) as file:
        file.metadata["gemma3.attention.sliding_window_pattern"] = [True, False] * 3 + [True]
        config = gguf._config(file)
    assert ModelConfig.from_dict(config).windows == (8, None, 8, None, 8, None, 8)


@pytest.mark.parametrize(
    ("arch", "extra", "named"),
    [
        ("falcon", {}, "falcon"),
        ("llama", {"llama.expert_count": 8}, "mixture of experts"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "longrope"),
        ("llama", {"llama.rope.dimension_count": 8}, "part of a head"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "bert"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(arch: str, extra: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, reference.make_tiny("llama", tmp_path / "hf"), arch, **extra)
    with pytest.raises(ModelError, match=named):
        converted(path)


def test_unknown_pre_tokenizer_and_unknown_tensor(tmp_path: Path) -> None:
    model = reference.make_tiny("llama", tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf", model, "llama", pre="mystery")
    with pytest.raises(ModelError, match=r"'mystery'.*smollm.*llama-bpe"):
        converted(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", reference.make_tiny("gemma3", tmp_path / "g"), "gemma3")
    data = (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(data.replace(b"blk.3.post_ffw_norm", b"blk.3.post_xyz_norm"))
    with pytest.raises(ModelError, match="post_xyz_norm"):
        converted(tmp_path / "c.gguf")


@pytest.mark.parametrize("keep", [0, 3, 10, 100, 5_000, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_a_model_error(keep: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", reference.make_tiny("llama", tmp_path / "hf"), "llama")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        converted(tmp_path / "cut.gguf")


def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "a.gguf"
    write_gguf(path, reference.make_tiny("gemma3", tmp_path / "hf"), "gemma3")
    theirs = GGUFReader(path)
    with GGUFFile(path) as ours:
        fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata.keys() == fields.keys()
        for key, value in fields.items():
            assert ours.metadata[key] == (pytest.approx(value) if isinstance(value, float) else value), key
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.offset, mine.type, mine.shape) == (
                tensor.data_offset,
                tensor.tensor_type,
                tuple(int(n) for n in tensor.shape[::-1]),
            )


def test_bfloat16_rounds_to_nearest_even() -> None:
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001], np.uint32)
    values = np.concatenate((random, ties.view(np.float32), [np.nan, -0.0])).astype(np.float32)
    found = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("gguf_read_once")
def test_smollm2_has_the_weights_that_transformers_reads(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    downloads = cache_directory() / "downloads"
    theirs = AutoModelForCausalLM.from_pretrained(downloads, gguf_file="smollm2-135m.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    with safe_open(smollm2 / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected.keys() - {"lm_head.weight"}
        for name in file.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(file.get_tensor(name), expected[name]), name


def test_gemma3_has_the_weights_of_the_dequantiser(gemma3: Path) -> None:
    names = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.8.attn_v.weight": "model.layers.8.self_attn.v_proj.weight",
        "blk.17.ffn_down.weight": "model.layers.17.mlp.down_proj.weight",
        "blk.9.post_ffw_norm.weight": "model.layers.9.post_feedforward_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }
    path = cache_directory() / "downloads" / "gemma3-270m.gguf"
    with GGUFFile(path) as file, safe_open(gemma3 / "model.safetensors", framework="pt") as found:
        assert len(found.keys()) == len(file.tensors)
        for name, ours in names.items():
            expected = file.dequantize(file.tensors[name]) - np.float32(1 if "norm" in name else 0)
            np.testing.assert_array_equal(found.get_tensor(ours).numpy(), expected)


def test_ids_and_template_reach_the_configuration(smollm2: Path, gemma3: Path) -> None:
    assert ModelConfig.from_directory(smollm2).eos_token_ids == (2,)
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)
    assert "<|im_start|>" in json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"]
    gemma = ModelConfig.from_directory(gemma3)
    assert gemma.eos_token_ids == (1,)
    assert "chat_template" not in json.loads((gemma3 / "tokenizer_config.json").read_text())
