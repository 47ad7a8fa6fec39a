"""Chooses tokens from logits, for a step in which each row has its own parameters.

Called by the executor after the model. Owns the order of what is done to a row of logits, as vLLM has it: biases (of
which one of minus infinity forbids), penalties, masks (here log-probabilities are taken), temperature, ``min_p``,
``top_k``, ``top_p``. What they leave is drawn from by the Gumbel-max rule: the token of the highest ``logit /
temperature + noise``, whose noise is a function of the sequence's seed, the output index and the token alone. Must
never depend on the batch, on time or on earlier draws; and as rounding moves logits by little, it changes a draw only
where two tokens tie (a draw by position in a running sum shifts with every weight before it).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pd_serve.compute.cpu.sampling_kernels import NUM_BINS, bin_weights, draw_among, draw_any, forbid, relative_weights
from pd_serve.compute.step import NO_LINE, Bias, Sampled, SamplingRow, Step
from pd_serve.wire.link import TokenLogprob

F32 = npt.NDArray[np.float32]

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not know
GREEDY_BELOW = 1e-5  # temperatures: so small a one leaves one token, if it does not overflow
_MASK_64 = (1 << 64) - 1


class Sampler:
    """For a vocabulary. Owns the histories and biases that steps speak of by their lines."""

    def __init__(self, vocab_size: int) -> None:
        self._histories: dict[int, _History] = {}
        self._biases: dict[int, Bias] = {}
        self._weights = np.empty(vocab_size, np.float32)
        self._bins = np.empty(NUM_BINS, np.int64), np.empty(NUM_BINS, np.float64)

    def warm_up(self) -> None:
        """Compiles kernels or takes them from the cache."""
        for top_k in (0, 1):
            row = SamplingRow(0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, top_k, -1)
            self._draw(np.zeros(len(self._weights), np.float32), row)
        forbid(np.zeros(1, np.float32), np.zeros(1, np.int32))

    def sample(self, step: Step, logits: Tensor) -> Sampled:
        """A token for each sampled row of ``logits [N, vocab]`` (float32, overwritten), and what else is wanted."""
        for history in step.histories:
            self._histories[history.line] = _History(history.prompt, history.output)
        self._biases |= {bias.line: bias for bias in step.biases}
        prompt_logprobs = [
            self.logprobs(logits[rows.first : rows.first + len(rows.targets)], rows.targets.tolist(), rows.k)
            for rows in step.prompt_rows
        ]
        if len(step.sampled_rows) < len(logits):
            logits = logits[torch.from_numpy(step.sampled_rows)]
        if not len(logits):
            return Sampled([], [], prompt_logprobs)
        rows, params = logits.numpy(), [SamplingRow._make(row) for row in step.sampling.tolist()]
        masks = step.masks.reshape(-1, -(-rows.shape[1] // 32))
        for row, p in zip(rows, params, strict=True):
            self._adjust(row, p)
            if p.mask != NO_LINE:
                forbid(row, masks[p.mask])
        tokens = rows.argmax(axis=1).tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(params)
        for i, p in enumerate(params):
            if p.temperature >= GREEDY_BELOW and (p.mask == NO_LINE or np.isfinite(rows[i, tokens[i]])):
                tokens[i] = self._draw(rows[i], p)
            if p.history != NO_LINE:
                self._histories[p.history].add(tokens[i])
            if p.logprobs >= 0:
                logprobs[i] = self.logprobs(logits[i : i + 1], [tokens[i]], p.logprobs)[0]
        return Sampled(tokens, logprobs, prompt_logprobs)

    @torch.inference_mode()
    def logprobs(self, logits: Tensor, next_tokens: Seq[int], k: int) -> list[TokenLogprob]:
        """Log-probability, rank and the ``k`` most likely tokens for each row of ``logits [M, vocab]``."""
        chosen = logits.gather(1, torch.tensor(next_tokens)[:, None])
        total = logits.logsumexp(dim=1, keepdim=True)
        ranks = (logits > chosen).sum(dim=1) + 1
        best, ids = logits.topk(min(k, logits.shape[1]), dim=1)
        own = (chosen - total).clamp_min(LOWEST_LOGPROB)[:, 0].tolist()
        top = (best - total).clamp_min(LOWEST_LOGPROB).tolist()
        return [
            TokenLogprob(token, logprob, rank, list(zip(tops, values, strict=True)))
            for token, logprob, rank, tops, values in zip(
                next_tokens, own, ranks.tolist(), ids.tolist(), top, strict=True
            )
        ]

    def _adjust(self, row: F32, params: SamplingRow) -> None:
        """Everything that is done to logits before log-probabilities are taken."""
        if params.bias != NO_LINE:
            bias = self._biases[params.bias]
            kept = row[bias.tokens] + bias.values
            if bias.only:
                row.fill(-np.inf)
            row[bias.tokens] = kept
        if params.history != NO_LINE:
            self._histories[params.history].penalise(row, params)

    def _draw(self, row: F32, params: SamplingRow) -> int:
        """The token that the noise of the row's seed and index picks among those that the filters leave."""
        key = noise_key(params.seed, params.output_index)
        top_k = params.top_k if 0 < params.top_k < len(row) else 0
        if not top_k and params.top_p >= 1:
            return int(draw_any(row, params.temperature, params.min_p, key))
        total = relative_weights(row, params.temperature, params.min_p, self._weights)
        # enough of the most likely tokens to hold all that the filters keep: what is sorted is small
        counts, masses = self._bins
        mass = np.inf if top_k else params.top_p * total  # top_p is a share of what top_k leaves
        lowest = bin_weights(self._weights, counts, masses, top_k or len(row), mass)
        ids = np.flatnonzero(self._weights >= lowest)
        weights = self._weights[ids]
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        if top_k and top_k < len(ids):
            kept = int(np.searchsorted(-weights, -weights[top_k - 1], side="right"))  # ties are kept
            ids, weights = ids[:kept], weights[:kept]
        sums = np.cumsum(weights, dtype=np.float64)
        if params.top_p < 1:
            mass = params.top_p * sums[-1] if top_k else mass
            ids = ids[: int(np.searchsorted(sums, mass)) + 1]
        return int(draw_among(row, ids, params.temperature, key))


class _History:
    """The distinct tokens of a sequence and how often each is output, kept up to date token by token."""

    def __init__(self, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> None:
        distinct, counts = np.unique(output, return_counts=True)
        self._ids = np.union1d(prompt, distinct).astype(np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)  # in the output
        self._counts[np.searchsorted(self._ids, distinct)] = counts
        self._num = len(self._ids)  # of the arrays, which have room for more
        self._place = {token: place for place, token in enumerate(self._ids.tolist())}

    def add(self, token: int) -> None:
        """It is output."""
        place = self._place.setdefault(token, self._num)
        if place == self._num:
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
            self._num += 1
        self._counts[place] += 1

    def penalise(self, row: F32, params: SamplingRow) -> None:
        """Repetition for all tokens seen, then frequency and presence for those that are output."""
        ids, counts = self._ids[: self._num], self._counts[: self._num]
        values = row[ids]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values


def noise_key(seed: int, index: int) -> np.uint64:
    """What the noise of output token ``index`` starts from: SplitMix64, seeded twice over."""
    return np.uint64(_mix(_mix(seed) + index))


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
