"""Weights that are missing, unknown, misshapen or broken never load; dummy ones are the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pd_serve.compute.cpu import ops
from pd_serve.errors import ModelError
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.layers import GatedMlp
from tests.models.reference import load, logits, make_tiny

TOKENS = torch.arange(3, 40)


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces (or drops, for None) tensors of a saved model; ``.`` in names is written ``__``."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, directory / "model.safetensors")


def test_missing_tensors_are_all_named(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    rewrite(tmp_path, model__layers__1__self_attn__k_proj__weight=None, model__norm__weight=None, lm_head__weight=None)
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.self_attn\.k_proj\.weight.*norm.*lm_head"):
        load(tmp_path)


@pytest.mark.parametrize("fused", [False, True])
def test_missing_experts_are_named(fused: bool, tmp_path: Path) -> None:
    make_tiny("qwen3-moe", tmp_path, save_original_format=not fused)
    name = "model__layers__1__mlp__experts__" + ("down_proj" if fused else "7__up_proj__weight")
    rewrite(tmp_path, **{name: None}, model__layers__2__mlp__experts__12__up_proj__weight=torch.ones(40, 64))
    named = name.replace("__", ".").replace(".", r"\.")
    with pytest.raises(ModelError, match=rf"lack {named} and hold the unknown .*2\.mlp\.experts\.12\.up_proj"):
        load(tmp_path)


def test_unknown_tensors_are_refused_but_computed_ones_ignored(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load(tmp_path)
    rewrite(tmp_path, model__layers__0__mlp__gate_proj__bias=torch.ones(96))
    with pytest.raises(ModelError, match=r"hold the unknown model\.layers\.0\.mlp\.gate_proj\.bias"):
        load(tmp_path)


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path: Path) -> None:
    make_tiny("llama-tied-eps", tmp_path)
    expected = logits(load(tmp_path), TOKENS)
    rewrite(tmp_path, lm_head__weight=torch.zeros(320, 64))
    torch.testing.assert_close(logits(load(tmp_path), TOKENS), expected)


def test_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    rewrite(tmp_path, model__layers__2__mlp__down_proj__weight=torch.ones(64, 95))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj\.weight has shape \(64, 95\).*\(64, 96\)"):
        load(tmp_path)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    rewrite(tmp_path, lm_head__weight=torch.ones(320, 64, dtype=torch.int8))
    with pytest.raises(ModelError, match="int8"):
        load(tmp_path)


def test_a_broken_file_and_a_lost_shard(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=shard.name):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks {shard.name}"):
        load(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_stored_dtype_does_not_matter(stored: torch.dtype, tmp_path: Path) -> None:
    make_tiny("qwen2", tmp_path)
    half = {name: tensor.to(stored) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    decoder = load(tmp_path)
    assert decoder.dtype == torch.float32
    (bias,) = decoder.weights.layers[0].attention.qkv(torch.zeros(1, 64))
    torch.testing.assert_close(bias[:64], half["model.layers.0.self_attn.q_proj.bias"].float(), atol=0, rtol=0)
    (column,) = decoder.weights.layers[0].mlp.down(torch.eye(96)[:1])
    torch.testing.assert_close(column, half["model.layers.0.mlp.down_proj.weight"][:, 0].float(), atol=0, rtol=0)


def test_norm_weights_of_gemma_hold_one_plus_w_in_float32(tmp_path: Path) -> None:
    make_tiny("gemma3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    norm = load(tmp_path, "bfloat16").weights.norm
    torch.testing.assert_close(norm, 1.0 + stored, atol=0, rtol=0)


def dummy(directory: Path, dtype: str = "float32") -> Decoder:
    return load_decoder(directory, ModelConfig.from_directory(directory), dtype, "dummy", ops=ops)


@pytest.mark.parametrize("family", ["llama", "qwen3-biases", "qwen3-moe-step", "gemma3"])
def test_dummy_weights_need_no_files_and_are_deterministic(family: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = dummy(tmp_path), dummy(tmp_path)
    a = logits(first, TOKENS)
    torch.testing.assert_close(logits(second, TOKENS), a, atol=0, rtol=0)
    assert a.isfinite().all() and a.std() > 0
    mlps = [layer.mlp for layer in first.weights.layers if isinstance(layer.mlp, GatedMlp)]
    matrices = [mlp.down(torch.eye(96)).T for mlp in mlps]
    assert not torch.equal(matrices[0], matrices[1])
    assert len(torch.unique(matrices[0], dim=0)) == len(matrices[0])


def test_no_weights_at_all_says_what_to_do(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--load-format dummy"):
        load(tmp_path)
