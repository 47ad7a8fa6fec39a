"""Chooses tokens from logits, for a batch in which each sequence has its own parameters.

Called by the engine's core after each step. Owns the order of what is done to a row of logits, as vLLM has it:
``logit_bias``, ``min_tokens``, penalties (here log-probabilities are taken), temperature, ``min_p``, ``top_k``,
``top_p``. What they leave is drawn from by the Gumbel-max rule: the token of the highest ``logit / temperature +
noise``, whose noise is a function of the sequence's seed, the output index and the token alone. Must never depend on
the batch, on time or on earlier draws; and as rounding moves logits by little, it changes a draw only where two tokens
tie (a draw by position in a running sum shifts with every weight before it).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pd_serve.compute.cpu.sampling_kernels import NUM_BINS, bin_weights, draw_among, draw_any, relative_weights
from pd_serve.engine.sequence import Sequence
from pd_serve.wire.link import SamplingParams, TokenLogprob

F32 = npt.NDArray[np.float32]

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not know
GREEDY_BELOW = 1e-5  # temperatures: so small a one leaves one token, if it does not overflow
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampled:
    """One entry a sequence, in the order asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """For a vocabulary and the model's end-of-sequence ids. Its state of a sequence is in ``seq.sampler_state``."""

    def __init__(self, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._eos = tuple(eos_token_ids)
        self._weights = np.empty(vocab_size, np.float32)
        self._bins = np.empty(NUM_BINS, np.int64), np.empty(NUM_BINS, np.float64)
        for top_k in (0, 1):  # compiles the kernels or takes them from the cache, so that no request waits for it
            self._draw(
                np.zeros(vocab_size, np.float32), SamplingParams(max_tokens=1, seed=0, top_k=top_k), noise_key(0, 0)
            )

    def sample(self, logits: Tensor, seqs: Seq[Sequence]) -> Sampled:
        """One token for each row of ``logits [N, vocab]`` (float32, overwritten)."""
        rows = logits.numpy()
        for row, seq in zip(rows, seqs, strict=True):
            self._adjust(row, seq)
        tokens = rows.argmax(axis=1).tolist()
        for i, seq in enumerate(seqs):
            if seq.sampling.temperature >= GREEDY_BELOW:
                tokens[i] = self._draw(rows[i], seq.sampling, noise_key(seq.sampling.seed, seq.output_index))
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        for i, seq in enumerate(seqs):
            if seq.sampling.logprobs >= 0:
                logprobs[i] = self.prompt_logprobs(logits[i : i + 1], [tokens[i]], seq.sampling.logprobs)[0]
        return Sampled(tokens, logprobs)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, next_tokens: Seq[int], k: int) -> list[TokenLogprob]:
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

    def _adjust(self, row: F32, seq: Sequence) -> None:
        """Everything that is done to logits before log-probabilities are taken."""
        params = seq.sampling
        if params.logit_bias:
            row[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
        if seq.output_index < params.min_tokens:
            ends = params.stop_token_ids if params.ignore_eos else (*self._eos, *params.stop_token_ids)
            row[np.array(ends, np.int64)] = -np.inf
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            history = seq.sampler_state
            if not isinstance(history, _History):
                history = seq.sampler_state = _History()
            history.update(seq)
            history.penalise(row, params)

    def _draw(self, row: F32, params: SamplingParams, key: np.uint64) -> int:
        """The token that the noise of ``key`` picks among those that the filters leave."""
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

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(256, np.int64)
        self._counts = np.empty(256, np.float32)  # in the output
        self._num_tokens = 0  # of the sequence, seen so far

    def update(self, seq: Sequence) -> None:
        for index, token in enumerate(seq.tokens[self._num_tokens :].tolist(), start=self._num_tokens):
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = len(self._place)
                if place == len(self._ids):
                    self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
                self._ids[place], self._counts[place] = token, 0
            self._counts[place] += index >= seq.num_prompt
        self._num_tokens = seq.num_tokens

    def penalise(self, row: F32, params: SamplingParams) -> None:
        """Repetition for all tokens seen, then frequency and presence for those that are output."""
        ids, counts = self._ids[: len(self._place)], self._counts[: len(self._place)]
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
