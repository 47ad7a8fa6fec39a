"""Passes over rows of logits for the sampler, and for :func:`pd_serve.compute.cpu.ops.settle`, each reading the
vocabulary once, unsorted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pd_serve.jit import bits_of, exp, float_of, kernel, larger

NUM_BINS = 1 << 11  # of weights by the upper bits of their float32: eight to a power of two
_BIN_SHIFT = 20
_CHUNK = 1024
_SMALLEST = np.finfo(np.float32).tiny
_UNDERFLOW = np.float32(-87.0)  # smaller weights are 0: no noise is large enough for them (the largest is 37)
_MARGIN = 1.0001  # more than float32 rounds
_TO_UNIT = np.float32(2.0**-24)
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@kernel
def forbid(row: Any, mask: Any) -> None:
    """Minus infinity for tokens whose bit in the int32 words of ``mask`` is 0."""
    for word in range(len(mask)):
        bits, first = mask[word], 32 * word
        if bits != -1:
            for i in range(min(32, len(row) - first)):
                row[first + i] = row[first + i] if (bits >> i) & 1 else np.float32(-np.inf)


@kernel
def near_best(rows: Any, part: float, ids: Any, counts: Any) -> None:
    """Tokens whose logits are below the row's best by no more than ``part`` of it: how many there are, and the first
    that ``ids [N, K]`` has room for. A row of NaN has none."""
    best = np.empty(-(-rows.shape[1] // _CHUNK), np.float32)
    for n in range(len(rows)):
        row, highest = rows[n], np.float32(-np.inf)
        for chunk in range(len(best)):
            largest = np.float32(-np.inf)
            for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(row))):
                largest = larger(largest, row[i])
            best[chunk] = largest
            highest = larger(highest, largest)
        least, count = highest - abs(highest) * np.float32(part), 0
        for chunk in range(len(best)):
            if best[chunk] >= least:
                for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(row))):
                    if row[i] >= least:
                        if count < ids.shape[1]:
                            ids[n, count] = i
                        count += 1
        counts[n] = count


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
def arrival(key: Any, token: Any) -> Any:
    """A number of the exponential distribution for a token: -log(1 - v) for v in (0, 1) of 52 bits, never 0 or 1.

    Written so that small numbers, which decide, keep all of their precision.
    """
    v = (np.float64(_noise_bits(key, token) >> np.uint64(12)) + 0.5) * 2.0**-52
    return -math.log1p(-v)


@kernel
def _noise_bits(key: Any, token: Any) -> Any:
    """Element ``token`` of the SplitMix64 sequence (Steele et al., 2014) that starts at ``key``."""
    x = key + (np.uint64(token) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@kernel
def draw_any(row: Any, temperature: float, min_p: float, key: Any) -> Any:
    """The token of the highest ``row / temperature`` plus Gumbel noise, among those that ``min_p`` leaves.

    The noise is ``-log(arrival)``, and the few tokens that may win are compared in float64. Which ones may is seen from
    24 bits of the noise: a token wins only if its arrival, which is not below v, is below ``weight / exp(best)``.
    """
    highest = np.float32(-np.inf)
    for i in range(len(row)):
        highest = larger(highest, row[i])
    token = 0
    while token < len(row) - 1 and row[token] != highest:
        token += 1
    best = -math.log(arrival(key, token))
    factor, least = np.float32(1 / temperature), np.float32(min_p)
    for first in range(0, len(row), _CHUNK):
        stop = min(first + _CHUNK, len(row))
        reach = np.float32(math.exp(-best) * _MARGIN)
        chances = 0
        for i in range(first, stop):
            x = (row[i] - highest) * factor
            weight = exp(x)
            if x < _UNDERFLOW or weight < least:
                weight = np.float32(0)
            v = np.float32(np.int32(_noise_bits(key, i) >> np.uint64(40))) * _TO_UNIT
            chances += v < weight * reach
        if chances:
            for i in range(first, stop):
                x = (row[i] - highest) * factor
                if x >= _UNDERFLOW and exp(x) >= least:
                    score = (np.float64(row[i]) - highest) / temperature - math.log(arrival(key, i))
                    if score > best:
                        token, best = i, score
    return token


@kernel
def draw_among(row: Any, tokens: Any, temperature: float, key: Any) -> Any:
    """As :func:`draw_any`, among ``tokens``."""
    token, best = tokens[0], -np.inf
    for i in tokens:
        score = np.float64(row[i]) / temperature - math.log(arrival(key, i))
        if score > best:
            token, best = i, score
    return token


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
