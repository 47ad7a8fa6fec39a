"""Checkpoints in FP8 compute what their numbers say, dequantised or not; what is unknown in them is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pd_serve.compute.cpu import ops as cpu_ops
from pd_serve.errors import ModelError
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.models.fp8 import FP8
from pd_serve.models.interface import Fp8Weight, Routing
from pd_serve.models.quantization import BLOCK, parse
from tests.e2e import tiny_model
from tests.e2e.tiny_model import Size
from tests.models.fp8_files import FORMS, quantise
from tests.models.reference import load, logits

TOKENS = torch.arange(3, 40)
DENSE = Size(64, 2, 4, 2, 16, 256, 256)
SPARSE = Size(128, 2, 4, 2, 16, 48, 256, experts=8)


class KeepingOps:
    """The CPU's, but with matrices that stay in FP8 until they are multiplied."""

    fp8_weights = True

    def __init__(self) -> None:
        self.kept: list[Fp8Weight] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu_ops, name)

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Any:
        if isinstance(weight, Fp8Weight):
            self.kept.append(weight)
            weight = plain(weight)
        return cpu_ops.linear(weight, bias)

    def experts(self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str) -> Any:
        return cpu_ops.experts(self.of_each(gate_up), self.of_each(down), routing, activation)

    def of_each(self, weight: Tensor | Fp8Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return weight
        self.kept.append(weight)
        return torch.stack([plain(weight._replace(values=v, scale=s)) for v, s in zip(*weight[:2], strict=True)])


def plain(weight: Fp8Weight) -> Tensor:
    values, scale = weight.values.float(), weight.scale
    if weight.blocks:
        scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: len(values), : values.shape[1]]
        return values * scale
    return values * scale[:, None]


def checkpoint(form: str, folder: Path, size: Size = DENSE, **options: Any) -> tuple[Path, Path]:
    tiny_model.write(folder / "source", size)
    quantise(folder / "source", form, folder / "fp8", folder / "plain", **options)
    return folder / "fp8", folder / "plain"


@pytest.mark.parametrize(("form", "size"), [*((form, DENSE) for form in FORMS), ("blocks", SPARSE)])
def test_a_checkpoint_computes_what_its_numbers_say(form: str, size: Size, tmp_path: Path) -> None:
    packed, meant = checkpoint(form, tmp_path, size)
    expected = logits(load(meant), TOKENS)
    torch.testing.assert_close(logits(load(packed), TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load(tmp_path / "source"), TOKENS), expected, atol=1e-3)
    assert ModelConfig.from_directory(packed).quantization is not None


@pytest.mark.parametrize(
    ("form", "size", "kept"),
    [
        # a block of 128 rows that two matrices would share is not kept: of q, k and v, and of experts' gate and up
        ("blocks", DENSE, 3),
        ("blocks", SPARSE, 2),
        ("tensor-static", DENSE, 4),
        ("compressed-rows", SPARSE, 4),
    ],
)
def test_matrices_stay_in_fp8_for_devices_that_multiply_them(form: str, size: Size, kept: int, tmp_path: Path) -> None:
    packed, meant = checkpoint(form, tmp_path, size)
    ops = KeepingOps()
    made = load_decoder(packed, ModelConfig.from_directory(packed), "float32", ops=ops)
    torch.testing.assert_close(logits(made, TOKENS), logits(load(meant), TOKENS), atol=1e-5, rtol=1e-5)
    assert len(ops.kept) == 2 * kept
    assert {weight.values.dtype for weight in ops.kept} == {FP8}
    assert {weight.input_scale is None for weight in ops.kept} == {form != "tensor-static"}


@pytest.mark.parametrize("form", ["tensor-static", "compressed-tensor-dynamic"])
def test_scales_of_k_and_v(form: str, tmp_path: Path) -> None:
    packed, _ = checkpoint(form, tmp_path, kv_scales=(0.5, 0.125))
    assert ModelConfig.from_directory(packed).quantization.kv_cache  # type: ignore[union-attr]
    transforms = [layer.attention.transform for layer in load(packed).weights.layers]  # type: ignore[attr-defined]
    assert [(t.k_scale, t.v_scale) for t in transforms] == [(0.5, 0.125)] * 2
    tensors = load_file(packed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("v_scale"))
    save_file({**tensors, name: torch.tensor(-1.0)}, packed / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} must hold one number above 0"):
        load(packed)


def test_broken_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    packed, _ = checkpoint("compressed-rows", tmp_path)
    tensors = load_file(packed / "model.safetensors")
    file, name = packed / "model.safetensors", "model.layers.1.mlp.down_proj.weight_scale"
    for change, said in (
        ({name: torch.ones(63, 1)}, rf"{name} has shape \(63, 1\)"),
        ({name: torch.full((64, 1), float("nan"))}, f"{name} holds scales below 0 or no numbers"),
        ({name: None}, f"lack {name}"),
        ({"lm_head.weight_scale": torch.ones(3, 1)}, "hold the unknown lm_head.weight_scale"),
    ):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, file)
        with pytest.raises(ModelError, match=said):
            load(packed)
    config = packed / "config.json"
    config.write_bytes((tmp_path / "source" / "config.json").read_bytes())
    save_file(tensors, file)
    with pytest.raises(ModelError, match="no quantization_config"):
        load(packed)


@pytest.mark.parametrize("keeping", [False, True])
@pytest.mark.parametrize("form", ["blocks", "tensor-static", "compressed-rows"])
def test_made_up_weights_need_no_files(form: str, keeping: bool, tmp_path: Path) -> None:
    packed, _ = checkpoint(form, tmp_path)
    (packed / "model.safetensors").unlink()
    ops: Any = KeepingOps() if keeping else cpu_ops
    found = logits(load_decoder(packed, ModelConfig.from_directory(packed), "float32", "dummy", ops=ops), TOKENS)
    assert found.isfinite().all() and found.std() > 0
    assert not keeping or ops.kept


GROUP = FORMS["compressed-rows"][0]["config_groups"]["group_0"]


def changed(part: str, **values: Any) -> dict[str, Any]:
    group = {**GROUP, part: {**GROUP[part], **values}}
    return {**FORMS["compressed-rows"][0], "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ({"quant_method": "fp8", "kv_cache_scheme": "int8"}, "kv_cache_scheme"),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, "no pattern"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "list of names"),
        ({**FORMS["compressed-rows"][0], "format": "pack-quantized"}, "format 'pack-quantized'"),
        ({**FORMS["compressed-rows"][0], "config_groups": {}}, "config_groups"),
        ({**FORMS["compressed-rows"][0], "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme"),
        (changed("weights", num_bits=4), "weights '4 bits of type float'"),
        (changed("weights", strategy="group"), "weights.strategy 'group'"),
        (changed("weights", symmetric=False), "weights.symmetric"),
        (changed("input_activations", type="int"), "input_activations '8 bits of type int'"),
        (changed("input_activations", dynamic=False), "input_activations.dynamic"),
    ],
)
def test_other_quantisation_is_refused_by_name(said: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=f"quantization_config.*{named}"):
        parse({"quantization_config": said})


def test_what_is_ignored() -> None:
    said = {"quant_method": "fp8", "ignored_layers": ["lm_head", "model.layers.1", "mlp.gate", "re:.*visual.*"]}
    found = parse({"quantization_config": said})
    assert found is not None
    names = ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.gate", "model.visual.proj")
    assert not any(found.covers(name) for name in names)
    assert found.covers("model.layers.10.mlp.up_proj") and found.covers("model.layers.0.mlp.gate_proj")
