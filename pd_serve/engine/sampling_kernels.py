"""Passes over a row of logits for :mod:`pd_serve.engine.sampler`: each reads the vocabulary once, without sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from pd_serve.jit import bits_of, exp, float_of, kernel, larger

NUM_BINS = 1 << 11  # of weights by the upper bits of their float32: eight to a power of two
_BIN_SHIFT = 20
_CHUNK = 1024
_SMALLEST = np.finfo(np.float32).tiny
_UNDERFLOW = np.float32(-87.0)  # smaller weights are 0


@kernel
def relative_weights(row: Any, temperature: float, min_p: float, weights: Any) -> Any:
    """``weights = exp((row - max) / temperature)``, 0 where that is below ``min_p``. Returns their sum."""
    highest = np.float32(-np.inf)
    for i in range(len(row)):
        highest = larger(highest, row[i])
    factor, least = np.float32(1 / temperature), np.float32(min_p)
    total: Any = 0.0
    for first in range(0, len(row), _CHUNK):
        part = np.float32(0)
        for i in range(first, min(first + _CHUNK, len(row))):
            x = (row[i] - highest) * factor
            weight = exp(x)
            if x < _UNDERFLOW or weight < least:
                weight = np.float32(0)
            weights[i] = weight
            part += weight
        total += part
    return total


@kernel
def draw_any(weights: Any, target: float) -> Any:
    """The index at which the running sum of ``weights`` exceeds ``target``."""
    total: Any = 0.0
    last = 0
    for first in range(0, len(weights), _CHUNK):
        part = np.float32(0)
        stop = min(first + _CHUNK, len(weights))
        for i in range(first, stop):
            part += weights[i]
        if total + part > target:
            for i in range(first, stop):
                total += weights[i]
                if weights[i] > 0:
                    last = i
                    if total > target:
                        return i
        else:
            total += part
    return last  # reached by rounding only


@kernel
def bin_weights(weights: Any, counts: Any, masses: Any, num: int, mass: float) -> Any:
    """A weight such that those not below it are at least ``num``, or sum up to at least ``mass``, or are all but 0.

    ``counts`` and ``masses [NUM_BINS]`` are overwritten.
    """
    counts[:] = 0
    masses[:] = 0.0
    for i in range(len(weights)):
        index = bits_of(weights[i]) >> _BIN_SHIFT
        counts[index] += 1
        masses[index] += weights[i]
    seen, total = 0, 0.0
    index = NUM_BINS - 1
    while index > 0:
        seen += counts[index]
        total += masses[index]
        if seen >= num or total >= mass:
            break
        index -= 1
    return max(float_of(np.int32(index << _BIN_SHIFT)), _SMALLEST)
