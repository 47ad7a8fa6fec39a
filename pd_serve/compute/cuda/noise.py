"""Randomness of sampling: a number for each (seed, output index, token), whatever else is in the batch, and wherever.

Used inside of the sampler's kernels. It is the noise of the CPU's (:mod:`pd_serve.compute.cpu.sampler`):
SplitMix64 (Steele et al., 2014), seeded twice over, and from there its sequence, an element for each token.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def noise_key(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """64 bits for output token ``index`` of a sequence with ``seed`` (int64, taken as unsigned)."""
    return _mixed(_mixed(seed.to(tl.uint64) + _GOLDEN) + index.to(tl.uint64) + _GOLDEN)


@triton.jit
def arrival(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """A number of the exponential distribution for each of ``token`` (int32): -log(1 - v) for v in (0, 1), above 0."""
    bits = _mixed(key + (token.to(tl.uint64) + 1) * _GOLDEN)
    v = (bits >> 12).to(tl.int64).to(tl.float32) * 2.0**-52 + 2.0**-53
    # small numbers decide, where 1 - v keeps too few of the bits of v
    small = v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25)))
    return tl.where(v < 2.0**-6, small, -tl.log(1 - v))


@triton.jit
def _mixed(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
