"""Random matrices in FP8, whose scales differ from row to row or block to block, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.models.fp8 import FP8, MAX
from pd_serve.models.interface import Fp8Weight
from pd_serve.models.quantization import BLOCK
from tests.compute.cuda.device import DEVICE


def random_fp8(n: int, k: int, *, blocks: bool, input_scale: float | None = None) -> Fp8Weight:
    """Numbers of about 1 / sqrt(k)."""
    values = (torch.randn(n, k, device=DEVICE) * 40).clamp(-MAX, MAX).to(FP8)
    shape = (-(-n // BLOCK), -(-k // BLOCK)) if blocks else (n,)
    scale = (torch.rand(shape, device=DEVICE) + 0.5) * (k**-0.5 / 40)
    return Fp8Weight(values, scale, blocks, input_scale)


def meant(weight: Fp8Weight) -> Tensor:
    """In float32."""
    values, scale = weight.values.float(), weight.scale
    if not weight.blocks:
        return values * scale[:, None]
    n, k = values.shape
    return values * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n, :k]
