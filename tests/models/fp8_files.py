"""Checkpoints in FP8, in each form in which they are published, made of a plain one; and what their numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pd_serve.models.quantization import BLOCK

_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}
_TENSOR = {**_CHANNEL, "strategy": "tensor"}
_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def _compressed(weights: dict[str, Any], inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


# what config.json says, and which scales the files have: for a "block", a "row" or the whole "tensor"
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "mlp.gate"],
        },
        "block",
    ),
    "tensor-static": (
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["lm_head", "re:.*mlp.gate$"],
            "kv_cache_scheme": "static",
        },
        "tensor",
    ),
    "tensor-dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        "tensor",
    ),
    "compressed-rows": (_compressed(_CHANNEL, _TOKEN), "row"),
    "compressed-tensor": (_compressed(_TENSOR, {**_TOKEN, "strategy": "tensor", "dynamic": False}), "tensor"),
    "compressed-tensor-dynamic": (_compressed(_TENSOR, _TOKEN, kv_cache_scheme=_TENSOR), "tensor"),
    "compressed-blocks": (
        _compressed(
            {**_CHANNEL, "strategy": "block", "block_structure": [BLOCK, BLOCK]},
            {**_TOKEN, "strategy": "group", "group_size": BLOCK},
        ),
        "block",
    ),
}


def quantised(weight: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers in FP8, their scales as a file has them, and the float32 matrix that both stand for."""
    rows, columns = weight.shape
    if scaling == "row":
        scale = weight.abs().amax(1, keepdim=True) / 448
        full = scale
    elif scaling == "tensor":
        full = scale = weight.abs().amax() / 448
    else:
        high, wide = -(-rows // BLOCK), -(-columns // BLOCK)
        padded = torch.zeros(high * BLOCK, wide * BLOCK)
        padded[:rows, :columns] = weight
        scale = padded.view(high, BLOCK, wide, BLOCK).abs().amax((1, 3)) / 448
        full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    values = (weight / full).to(torch.float8_e4m3fn)
    return values, scale, values.float() * full


def quantise(source: Path, form: str, target: Path, plain: Path, kv_scales: tuple[float, float] | None = None) -> None:
    """Writes the checkpoint at ``source`` in a form to ``target``, and to ``plain`` what its numbers stand for."""
    said, scaling = FORMS[form]
    for folder in (target, plain):
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    tensors = load_file(source / "model.safetensors")
    written, meant = dict(tensors), dict(tensors)
    static = said.get("activation_scheme") == "static" or form == "compressed-tensor"
    name_of_scale = "weight_scale_inv" if form == "blocks" else "weight_scale"
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            written[name], written[f"{module}.{name_of_scale}"], meant[name] = quantised(tensor.float(), scaling)
            if static:
                written[f"{module}.input_scale"] = torch.tensor(0.02)
        if kv_scales is not None and name.endswith("k_proj.weight"):
            at = name.removesuffix("k_proj.weight")
            places = ("k_scale", "v_scale") if form.startswith("compressed") else ("k_proj.k_scale", "v_proj.v_scale")
            written |= {at + place: torch.tensor([value]) for place, value in zip(places, kv_scales, strict=True)}
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, target / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, plain / "model.safetensors")
