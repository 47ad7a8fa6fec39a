"""Chooses tokens from logits on the GPU, for a batch in which each row has its own parameters.

Called by the engine after each step, within its CUDA graph. The order of what is done to a row is the CPU sampler's
(:mod:`pd_serve.compute.cpu.sampler`): bias, penalties, masks (log-probabilities are taken of what is then there),
temperature, min-p, top-k, top-p. What they leave is drawn from by the Gumbel-max rule, here as a race, ``argmax
weight / arrival``: no row is sorted, and the CPU draws the same token but where two of them tie. A row's token is a
function of its logits, its parameters, its seed and its output index alone: must never depend on other rows, on how
many there are, or on time.

Where top-k and top-p cut is found without sorting, too: passes over the row count what is above a few levels, the few
weights between the last two levels are collected, and among these one program searches by halves. Sums are of integers,
exact, so that no order of programs changes a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute import step
from pd_serve.compute.cuda.delivery import Send
from pd_serve.compute.cuda.noise import arrival, noise_key
from pd_serve.compute.step import NO_LINE

GREEDY_BELOW = tl.constexpr(1e-5)  # temperatures: so small a one leaves one token, if it does not overflow
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not know
_UNDERFLOW = tl.constexpr(-87.0)  # exponents: smaller weights are 0
_TINY = tl.constexpr(float(np.finfo(np.float32).tiny))
_SCALE = tl.constexpr(2.0**37)  # of weights as integers: those of a chunk add up to less than _ONE
_ONE = tl.constexpr(1 << 50)
_CHUNK = 4096  # tokens of a program
_PASSES, _LEVELS = 3, 8  # over all tokens, each counts above so many levels: they narrow down where a threshold is
_CANDIDATES = 4096  # weights that one program can hold: where more are left, it reads the whole row again and again

# of each row, by the names of SamplingRow
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = ("top_k", "output_index", "history", "bias", "mask")
_GREEDY = {"top_p": 1, "repetition_penalty": 1, "history": NO_LINE, "bias": NO_LINE, "mask": NO_LINE}  # else 0


class Rows:
    """Parameters of up to ``max_rows`` rows, in one allocation."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        """On the host the memory is pinned where there is a GPU. All rows are greedy at first."""
        self.max_rows = max_rows
        words = (2 + len(_FLOATS) + len(_INTS)) * max_rows
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self.buffer = torch.zeros(words, dtype=torch.int32, device=device, pin_memory=pinned)
        self.seed = self.buffer[: 2 * max_rows].view(torch.int64)
        self._filled = max_rows
        self._by_field = fields = self.buffer[2 * max_rows :].view(-1, max_rows)
        floats = {name: fields[i].view(torch.float32) for i, name in enumerate(_FLOATS)}
        ints = {name: fields[len(_FLOATS) + i] for i, name in enumerate(_INTS)}
        self.fields = floats | ints
        for name, value in _GREEDY.items():
            self.fields[name].fill_(value)

    def fill(self, sampling: step.Rows, rows: int) -> None:
        """On the host: the first rows are ``sampling`` (of dtype SAMPLING), those up to ``rows`` greedy again."""
        used = len(sampling)
        self._filled = max(used, rows)
        self.seed[:used] = torch.from_numpy(sampling["seed"].astype(np.uint64).view(np.int64))
        for name, field in self.fields.items():
            values = field.numpy()
            values[:used] = sampling[name]
            values[used:rows] = _GREEDY.get(name, 0)

    def take(self, other: Rows, send: Send) -> None:
        """What was filled of ``other``, which may not be changed before it has arrived."""
        rows = other._filled
        send(self.seed[:rows], other.seed[:rows])
        send(self._by_field[:, :rows], other._by_field[:, :rows])


@dataclass(frozen=True)
class Sampled:
    tokens: Tensor  # [rows] int64
    adjusted: Tensor  # [rows, vocab] float32: logits with bias and penalties, as log-probabilities are taken of them


class Logprobs(NamedTuple):
    """Natural, not below ``LOWEST_LOGPROB``."""

    chosen: Tensor  # [rows] float32
    rank: Tensor  # [rows] int64, 1 = most likely
    top: Tensor  # [rows, k] float32, best first
    top_tokens: Tensor  # [rows, k] int64


class Sampler:
    """Owns the device's tables for a vocabulary: rows, histories of tokens (for penalties), biases, masks."""

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device, *, histories: int = 0, biases: int = 0
    ) -> None:
        """``histories`` and ``biases``: lines of their tables, of 4 bytes a token of the vocabulary each."""
        self.vocab_size = vocab_size
        self.rows = Rows(max_rows, device)
        # a history is twice how often a token is output, and 1 more if it is in the prompt
        self.histories = torch.zeros((histories, vocab_size), dtype=torch.int32, device=device)
        self.biases = torch.zeros((biases, vocab_size), dtype=torch.float32, device=device)
        # a bit a token, 1 where it may be sampled; lines as a step has them
        self.masks = torch.zeros((max_rows, triton.cdiv(vocab_size, 32)), dtype=torch.int32, device=device)
        chunks = triton.cdiv(vocab_size, _CHUNK)
        self._highest = torch.empty((max_rows, chunks), dtype=torch.float32, device=device)
        self._best = torch.empty((max_rows, chunks), dtype=torch.float32, device=device)
        self._best_token = torch.empty((max_rows, chunks), dtype=torch.int32, device=device)
        self._states = torch.zeros((_PASSES + 1, max_rows, 6), dtype=torch.int64, device=device)
        self._counts = torch.zeros((_PASSES, max_rows, chunks, _LEVELS), dtype=torch.int32, device=device)
        self._masses = torch.zeros((_PASSES, max_rows, chunks, _LEVELS), dtype=torch.int64, device=device)
        self._collected = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._threshold = torch.empty(max_rows, dtype=torch.float32, device=device)
        self._candidates = torch.empty((max_rows, _CANDIDATES), dtype=torch.float32, device=device)

    def start_history(self, line: int, prompt: Tensor, output: Tensor) -> None:
        """``prompt`` and ``output``: int64 token ids on the device. Later tokens are added by :meth:`sample`."""
        history = self.histories[line]
        history.zero_()
        history.index_fill_(0, prompt, 1)
        history.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def set_bias(self, line: int, tokens: Tensor, values: Tensor, *, only: bool = False) -> None:
        """``values`` float32 are added to the logits of ``tokens`` int64: minus infinity, and it is never sampled.
        ``only``: no other is."""
        bias = self.biases[line]
        bias.fill_(-float("inf") if only else 0.0)
        bias.index_copy_(0, tokens, values)

    def sample(self, logits: Tensor, out: Tensor | None = None) -> Sampled:
        """A token for each row of ``logits [N, vocab]``, by the first N of :attr:`rows`.

        float32 logits are overwritten by the adjusted ones; others get a new tensor. ``out [N]`` int64 gets the tokens.
        """
        n, vocab = logits.shape
        adjusted = logits if logits.dtype is torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        if out is None:
            out = torch.empty(n, dtype=torch.int64, device=logits.device)
        if n == 0:
            return Sampled(out, adjusted)
        f, chunks = self.rows.fields, triton.cdiv(vocab, _CHUNK)
        across = triton.next_power_of_2(chunks)
        histories, biases = (table if len(table) else self.rows.buffer for table in (self.histories, self.biases))
        _adjust[(n, chunks)](
            logits, logits.stride(0), adjusted, adjusted.stride(0), vocab, self._highest,
            f["repetition_penalty"], f["presence_penalty"], f["frequency_penalty"], f["history"], f["bias"],
            histories, biases, f["mask"], self.masks, self.masks.shape[1], self._collected,
            COPY=adjusted is not logits, CHUNK=_CHUNK, num_warps=8,
        )  # fmt: skip
        row = (adjusted, adjusted.stride(0), vocab, chunks, self._highest)
        filters = (f["temperature"], f["min_p"], f["top_k"], f["top_p"])
        counted = (self._states, self._counts, self._masses, self.rows.max_rows)
        sizes = {"LEVELS": _LEVELS, "ACROSS": across, "CHUNK": _CHUNK, "CANDIDATES": _CANDIDATES}
        for number in range(_PASSES):
            _count[(n, chunks)](*row, *filters, *counted, PASS=number, BLOCK=256, **sizes, num_warps=8)
        _collect[(n, chunks)](
            *row, *filters, *counted, self._collected, self._candidates, PASS=_PASSES, **sizes, num_warps=8
        )
        _find_threshold[(n,)](
            *row, *filters, self._states[_PASSES], self._candidates, self._threshold,
            ACROSS=across, CANDIDATES=_CANDIDATES, num_warps=16,
        )  # fmt: skip
        _race[(n, chunks)](
            adjusted, adjusted.stride(0), vocab, chunks, self._highest, f["temperature"], self._threshold,
            self.rows.seed, f["output_index"], self._best, self._best_token, ACROSS=across, CHUNK=_CHUNK, num_warps=8,
        )  # fmt: skip
        _finish[(n,)](
            self._best, self._best_token, chunks, vocab, f["history"], histories, out, ACROSS=across, num_warps=1
        )
        return Sampled(out, adjusted)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> Logprobs:
    """Of ``tokens [N]`` int64, and of the ``k`` most likely, for each row of ``logits [N, vocab]`` float32."""
    chosen = logits.gather(1, tokens[:, None])
    total = logits.logsumexp(1, keepdim=True)
    rank = (logits > chosen).sum(1) + 1
    best, ids = logits.topk(min(k, logits.shape[1]), 1)
    return Logprobs(
        (chosen - total).clamp_min(LOWEST_LOGPROB)[:, 0], rank, (best - total).clamp_min(LOWEST_LOGPROB), ids
    )


@triton.jit
def _adjust(
    logits: tl.tensor, logits_row: tl.tensor, adjusted: tl.tensor, adjusted_row: tl.tensor, vocab: tl.tensor,
    highest: tl.tensor, repetition: tl.tensor, presence: tl.tensor, frequency: tl.tensor, history: tl.tensor,
    bias: tl.tensor, histories: tl.tensor, biases: tl.tensor, mask: tl.tensor, masks: tl.tensor, words: tl.tensor,
    collected: tl.tensor,
    COPY: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits + row * logits_row + token, inside, other=-float("inf")).to(tl.float32)
    bias_line = tl.load(bias + row).to(tl.int64)
    history_line = tl.load(history + row).to(tl.int64)
    if bias_line >= 0:
        x += tl.load(biases + bias_line * vocab + token, inside, other=0.0)
    if history_line >= 0:
        seen = tl.load(histories + history_line * vocab + token, inside, other=0)
        penalty = tl.load(repetition + row)
        x = tl.where(seen > 0, tl.where(x > 0, x / penalty, x * penalty), x)
        count = (seen >> 1).to(tl.float32)
        x -= tl.load(frequency + row) * count + tl.where(count > 0, tl.load(presence + row), 0.0)
    mask_line = tl.load(mask + row).to(tl.int64)
    if mask_line >= 0:
        word = tl.load(masks + mask_line * words + token // 32, inside, other=0)
        x = tl.where((word >> (token % 32)) & 1, x, -float("inf"))
    if COPY or bias_line >= 0 or history_line >= 0 or mask_line >= 0:
        tl.store(adjusted + row * adjusted_row + token, x, inside)
    tl.store(highest + row * tl.num_programs(1) + chunk, tl.max(x))
    if chunk == 0:
        tl.store(collected + row, 0)


@triton.jit
def _row_highest(highest: tl.tensor, row: tl.tensor, chunks: tl.tensor, ACROSS: tl.constexpr) -> tl.tensor:
    chunk = tl.arange(0, ACROSS)
    return tl.max(tl.load(highest + row * chunks + chunk, chunk < chunks, other=-float("inf")))


@triton.jit
def _weights(
    row: tl.tensor, token: tl.tensor, vocab: tl.tensor, highest: tl.tensor, temperature: tl.tensor, least: tl.tensor
) -> tl.tensor:
    """Probabilities relative to the most likely token's, 0 below ``least``."""
    x = (tl.load(row + token, token < vocab, other=-float("inf")) - highest) * (1 / temperature)
    weight = tl.exp(x)
    return tl.where((x >= _UNDERFLOW) & (weight >= least), weight, 0.0)


@triton.jit
def _fixed(weight: tl.tensor) -> tl.tensor:
    """A weight as an integer: sums of them are exact, so that their order does not matter."""
    return (weight * _SCALE).to(tl.int64)


@triton.jit
def _bits(x: tl.tensor) -> tl.tensor:
    """The order of positive floats is the order of their bits."""
    return x.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _filters(
    row: tl.tensor, vocab: tl.tensor, temperatures: tl.tensor, min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor
) -> tl.tensor:
    """Of a row: temperature, the least weight for min-p, top-k (0: off), top-p, and whether one of these two is on."""
    temperature = tl.load(temperatures + row)
    num, share = tl.load(top_k + row), tl.load(top_p + row)
    num = tl.where(num < vocab, num, 0)
    least = tl.maximum(tl.load(min_p + row), _TINY)
    return temperature, least, num, share, (temperature >= GREEDY_BELOW) & ((num > 0) | (share < 1))


@triton.jit
def _levels(low: tl.tensor, high: tl.tensor, PASS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Bits of weights at which a pass counts, falling from below ``high`` to ``low``."""
    i = tl.arange(0, LEVELS)
    if PASS == 0:  # most of what matters is near the most likely token
        exponent = (1 + i * (i + 1) // 2).to(tl.float32)
        return tl.maximum(tl.where(i < LEVELS - 1, _bits(tl.exp2(-exponent)), 0), low)
    else:
        return low + (high - low) * (LEVELS - 1 - i) // LEVELS


@triton.jit
def _narrowed(
    row: tl.tensor, chunks: tl.tensor, num: tl.tensor, share: tl.tensor, state: tl.tensor, counts: tl.tensor,
    masses: tl.tensor,
    PASS: tl.constexpr, LEVELS: tl.constexpr, ACROSS: tl.constexpr, CANDIDATES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where the threshold is, known from pass ``PASS``: at ``low`` or above it, and below ``high`` (bits).

    ``size``: how many weights are candidates (with top-k those from ``high`` on are, too); ``above``, ``mass``: how
    many are not below ``high``, and their sum; ``total``: the sum of all.
    """
    state += row * 6
    low, high, size = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    above, mass, total = tl.load(state + 3), tl.load(state + 4), tl.load(state + 5)
    if size > CANDIDATES:
        levels = _levels(low, high, PASS, LEVELS)
        i, chunk = tl.arange(0, LEVELS), tl.arange(0, ACROSS)
        at = (row * chunks + chunk[:, None]) * LEVELS + i[None, :]
        count = tl.sum(tl.load(counts + at, (chunk < chunks)[:, None], other=0), 0).to(tl.int64)
        sums = tl.sum(tl.load(masses + at, (chunk < chunks)[:, None], other=0), 0)
        if PASS == 0:
            total = tl.max(sums)
        by_mass = sums.to(tl.float64) >= share.to(tl.float64) * total.to(tl.float64)
        enough = tl.where(num > 0, count >= num, by_mass) | (i == LEVELS - 1)
        next_low = tl.max(tl.where(enough, levels, 0))
        next_high = tl.min(tl.where(enough, high, levels))
        if next_high < high:
            above = tl.max(tl.where(levels == next_high, count, 0))
            mass = tl.max(tl.where(levels == next_high, sums, 0))
        low, high = next_low, next_high
        size = tl.max(tl.where(levels == low, count, 0)) - tl.where(num > 0, 0, above)
    return low, high, size, above, mass, total


@triton.jit
def _keep_state(
    state: tl.tensor, row: tl.tensor, low: tl.tensor, high: tl.tensor, size: tl.tensor, above: tl.tensor,
    mass: tl.tensor, total: tl.tensor,
) -> None:  # fmt: skip
    state += row * 6
    tl.store(state, low)
    tl.store(state + 1, high)
    tl.store(state + 2, size)
    tl.store(state + 3, above)
    tl.store(state + 4, mass)
    tl.store(state + 5, total)


@triton.jit
def _count(
    adjusted: tl.tensor, adjusted_row: tl.tensor, vocab: tl.tensor, chunks: tl.tensor, highest: tl.tensor,
    temperatures: tl.tensor, min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, states: tl.tensor, counts: tl.tensor,
    masses: tl.tensor, max_rows: tl.tensor,
    PASS: tl.constexpr, LEVELS: tl.constexpr, ACROSS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Narrows down where a row's threshold is, and counts what is above each of a few levels between."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, least, num, share, filtered = _filters(row, vocab, temperatures, min_p, top_k, top_p)
    if filtered:
        table = max_rows * chunks * LEVELS
        if PASS == 0:
            zero = row * 0
            low, high = _bits(least), _bits(least * 0 + 1) + 1
            size, above, mass, total = zero + CANDIDATES + 1, zero, zero, zero
        else:
            low, high, size, above, mass, total = _narrowed(
                row, chunks, num, share, states + (PASS - 1) * max_rows * 6, counts + (PASS - 1) * table,
                masses + (PASS - 1) * table, PASS - 1, LEVELS, ACROSS, CANDIDATES,
            )  # fmt: skip
        if chunk == 0:
            _keep_state(states + PASS * max_rows * 6, row, low, high, size, above, mass, total)
        if size > CANDIDATES:
            top = _row_highest(highest, row, chunks, ACROSS)
            levels = _float(_levels(low, high, PASS, LEVELS))
            both = tl.zeros([LEVELS, BLOCK], tl.int64)  # sums, and above their bits the counts
            for first in range(0, CHUNK, BLOCK):
                token = chunk * CHUNK + first + tl.arange(0, BLOCK)
                weight = _weights(adjusted + row * adjusted_row, token, vocab, top, temperature, least)
                one = _fixed(weight) + _ONE
                both += tl.where(weight[None, :] >= levels[:, None], one[None, :], 0)
            reached = tl.sum(both, 1)
            at = PASS * table + (row * chunks + chunk) * LEVELS + tl.arange(0, LEVELS)
            tl.store(counts + at, (reached // _ONE).to(tl.int32))
            tl.store(masses + at, reached % _ONE)


@triton.jit
def _collect(
    adjusted: tl.tensor, adjusted_row: tl.tensor, vocab: tl.tensor, chunks: tl.tensor, highest: tl.tensor,
    temperatures: tl.tensor, min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, states: tl.tensor, counts: tl.tensor,
    masses: tl.tensor, max_rows: tl.tensor, collected: tl.tensor, candidates: tl.tensor,
    PASS: tl.constexpr, LEVELS: tl.constexpr, ACROSS: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """The weights among which a row's threshold is, in any order, if they are not too many."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, least, num, share, filtered = _filters(row, vocab, temperatures, min_p, top_k, top_p)
    if filtered:
        table = max_rows * chunks * LEVELS
        low, high, size, above, mass, total = _narrowed(
            row, chunks, num, share, states + (PASS - 1) * max_rows * 6, counts + (PASS - 1) * table,
            masses + (PASS - 1) * table, PASS - 1, LEVELS, ACROSS, CANDIDATES,
        )  # fmt: skip
        if chunk == 0:
            _keep_state(states + PASS * max_rows * 6, row, low, high, size, above, mass, total)
        if size <= CANDIDATES:
            top = _row_highest(highest, row, chunks, ACROSS)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            weight = _weights(adjusted + row * adjusted_row, token, vocab, top, temperature, least)
            kept = (weight >= _float(low)) & ((num > 0) | (weight < _float(high)))
            one = kept.to(tl.int32)
            number = tl.sum(one)
            if number > 0:
                first = tl.atomic_add(collected + row, number)
                tl.store(candidates + row * CANDIDATES + first + tl.cumsum(one) - one, weight, kept)


@triton.jit
def _find_threshold(
    adjusted: tl.tensor, adjusted_row: tl.tensor, vocab: tl.tensor, chunks: tl.tensor, highest: tl.tensor,
    temperatures: tl.tensor, min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, state: tl.tensor,
    candidates: tl.tensor, threshold: tl.tensor,
    ACROSS: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """``threshold [rows]``: the smallest weight that min-p, top-k and top-p leave. Equals of it stay."""
    row = tl.program_id(0).to(tl.int64)
    temperature, least, num, share, filtered = _filters(row, vocab, temperatures, min_p, top_k, top_p)
    found = least
    if filtered:
        top = _row_highest(highest, row, chunks, ACROSS)
        adjusted += row * adjusted_row
        state += row * 6
        low, high, size = tl.load(state), tl.load(state + 1), tl.load(state + 2)
        mass, total = tl.load(state + 4), tl.load(state + 5)
        few = size <= CANDIDATES
        i = tl.arange(0, CANDIDATES)
        weights = tl.load(candidates + row * CANDIDATES + i, (i < size) & few, other=0.0)
        never = float("inf")
        if num > 0:
            low = _lowest(adjusted, vocab, top, temperature, weights, few, low, high, num, never, mass * 0, CANDIDATES)
            if share < 1:
                _, total = _above(adjusted, vocab, top, temperature, weights, few, _float(low), CANDIDATES)
                one = _bits(least * 0 + 1) + 1
                target = share.to(tl.float64) * total.to(tl.float64)
                low = _lowest(
                    adjusted, vocab, top, temperature, weights, few, low, one, vocab + 1, target, mass * 0, CANDIDATES
                )
        else:
            target = share.to(tl.float64) * total.to(tl.float64)
            base = tl.where(few, mass, 0)  # of the weights from high on, which are no candidates
            low = _lowest(
                adjusted, vocab, top, temperature, weights, few, low, high, vocab + 1, target, base, CANDIDATES
            )
        found = _float(low)
    tl.store(threshold + row, found)


@triton.jit
def _lowest(
    adjusted: tl.tensor, vocab: tl.tensor, highest: tl.tensor, temperature: tl.tensor, weights: tl.tensor,
    few: tl.tensor, low: tl.tensor, high: tl.tensor, num: tl.tensor, target: tl.tensor, base: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bits of the largest weight such that those not below it are ``num``, or sum up to ``target`` with ``base``.

    It is sought from ``low`` on, and known to be below ``high``.
    """
    while high - low > 1:
        middle = low + (high - low) // 2
        count, mass = _above(adjusted, vocab, highest, temperature, weights, few, _float(middle), BLOCK)
        enough = (count >= num) | ((base + mass).to(tl.float64) >= target)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _above(
    adjusted: tl.tensor, vocab: tl.tensor, highest: tl.tensor, temperature: tl.tensor, weights: tl.tensor,
    few: tl.tensor, least: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """How many weights are not below ``least``, and their sum: of ``weights`` if these are all, else of the row."""
    if few:
        count = tl.sum((weights >= least).to(tl.int32))
        mass = tl.sum(tl.where(weights >= least, _fixed(weights), 0))
    else:
        counts = tl.zeros([BLOCK], tl.int32)
        masses = tl.zeros([BLOCK], tl.int64)
        for first in range(0, vocab, BLOCK):
            weight = _weights(adjusted, first + tl.arange(0, BLOCK), vocab, highest, temperature, least)
            counts += (weight > 0).to(tl.int32)
            masses += _fixed(weight)
        count, mass = tl.sum(counts), tl.sum(masses)
    return count, mass


@triton.jit
def _race(
    adjusted: tl.tensor, adjusted_row: tl.tensor, vocab: tl.tensor, chunks: tl.tensor, highest: tl.tensor,
    temperatures: tl.tensor, threshold: tl.tensor, seeds: tl.tensor, indices: tl.tensor, best: tl.tensor,
    best_token: tl.tensor,
    ACROSS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """The winner of each chunk of each row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    adjusted += row * adjusted_row
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        score = tl.load(adjusted + token, token < vocab, other=-float("inf"))
    else:
        top = _row_highest(highest, row, chunks, ACROSS)
        weight = _weights(adjusted, token, vocab, top, temperature, tl.load(threshold + row))
        key = noise_key(tl.load(seeds + row), tl.load(indices + row))
        score = tl.where(weight > 0, weight / arrival(key, token), -1.0)
    winner, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * chunks + chunk, winner)
    tl.store(best_token + row * chunks + chunk, chunk * CHUNK + place)


@triton.jit
def _finish(
    best: tl.tensor, best_token: tl.tensor, chunks: tl.tensor, vocab: tl.tensor, history: tl.tensor,
    histories: tl.tensor, out: tl.tensor,
    ACROSS: tl.constexpr,
) -> None:  # fmt: skip
    """The winner of each row, and its mark in the row's history."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, ACROSS)
    score = tl.load(best + row * chunks + chunk, chunk < chunks, other=-float("inf"))
    _, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.minimum(tl.load(best_token + row * chunks + place), vocab - 1)
    tl.store(out + row, token.to(tl.int64))
    line = tl.load(history + row).to(tl.int64)
    if line >= 0:
        count = histories + line * vocab + token
        tl.store(count, tl.load(count) + 2)
