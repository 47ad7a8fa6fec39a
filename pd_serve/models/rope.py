"""Tables of rotary embeddings: cosines and sines for each position.

Called by the decoder once, when it is made. Kinds of scaling: linear (position interpolation), llama3 (long
wavelengths stretched, short ones kept, a blend between), YaRN (Peng et al., 2023, arXiv:2309.00071), LongRoPE (Ding et
al., 2024, arXiv:2402.13753) and dynamic NTK, whose base follows the longest sequence that the model may get: with one
that follows each sequence's length, as in transformers, keys in the cache would go stale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pd_serve.models.rope_config import RopeConfig


def cos_sin_table(rope: RopeConfig, positions: int, device: torch.device | None = None) -> Tensor:
    """``[positions, head_dim]`` float32: a row holds the cosines of a position, then its sines."""
    frequencies, scale = inverse_frequencies(rope)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    table = torch.empty(positions, rope.head_dim, dtype=torch.float32)
    half = rope.head_dim // 2
    torch.cos(angles, out=table[:, :half])
    torch.sin(angles, out=table[:, half:])
    if scale != 1.0:
        table *= scale
    return table.to(device) if device is not None else table


def inverse_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """``[head_dim / 2]`` float32, and the factor that multiplies cosines and sines."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    if rope.kind == "dynamic":
        # original_positions * factor is the longest sequence
        growth = rope.factor * rope.factor - (rope.factor - 1)
        theta = rope.theta * growth ** (rope.head_dim / (rope.head_dim - 2))
        return 1.0 / (theta**exponents), 1.0
    if rope.kind == "longrope":
        factors = torch.tensor(rope.long_factors if rope.long else rope.short_factors)
        return 1.0 / (factors * rope.theta**exponents), _longrope_scale(rope)
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_scale(rope)
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    turns = rope.original_positions * plain / (2 * math.pi)  # full turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: Tensor) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension whose wavelength makes ``turns`` turns in the original context."""
        span = math.log(rope.original_positions / (turns * 2 * math.pi))
        return rope.head_dim * span / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1.0 - ramp)


def _yarn_scale(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1 or rope.original_positions <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))
