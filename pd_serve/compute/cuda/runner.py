"""Queues steps on the device: model, attention and sampler, launched one kernel after another or by a CUDA graph.

Owned by the executor. Everything goes to the current stream and nothing waits for it. Steps of decodes alone are
replayed from graphs, one for each size of a ladder; others, up to some size, from pieces with attention between;
what is larger, or wants log-probabilities of a prompt, is launched kernel by kernel. What a step sampled stays on the
device, where the next one finds its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pd_serve.compute.cuda import kernels
from pd_serve.compute.cuda.inputs import Inputs, Staging
from pd_serve.compute.cuda.offload import Ring
from pd_serve.compute.cuda.paged import PagedAttention
from pd_serve.compute.cuda.pieces import Pieces
from pd_serve.compute.cuda.sampler import Logprobs, Sampler, logprobs
from pd_serve.compute.step import I32, SAMPLING, Step
from pd_serve.models.decoder import Decoder

_PROMPT_ROWS = 256  # whose logits are in memory at once
_STAGINGS = 2


class Limits(NamedTuple):
    """The largest step."""

    tokens: int
    seqs: int
    blocks: int  # of a sequence


class Queued(NamedTuple):
    """What a step will have led to, on the device."""

    tokens: Tensor  # [S] int64
    logprobs: Logprobs | None  # of all of them, if any row wants them
    prompts: list[Logprobs]  # of each of ``prompt_rows``


def ladder(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for, largest first: smaller steps are filled up."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return sorted({most, *(size for size in sizes if size < most)}, reverse=True)


class Runner:
    """``inputs``: on the device; ``attention`` finds its slots there. ``ring``: what brings layers from the host."""

    def __init__(
        self,
        model: Decoder,
        attention: PagedAttention,
        inputs: Inputs,
        limits: Limits,
        *,
        ring: Ring | None = None,
    ) -> None:
        self.model = model
        self._attention = attention
        self._inputs = inputs
        self._device = model.device
        self._limits = limits
        self._ring = ring
        groups = len(inputs.slots)
        sizes = (limits.tokens, limits.seqs, limits.blocks, groups, self._device)
        self._stagings = [Staging(*sizes) for _ in range(_STAGINGS)]
        self._turn = 0
        self._sampler = Sampler(
            model.config.vocab_size, limits.seqs, self._device, histories=limits.seqs, biases=limits.seqs
        )
        self._samples = torch.zeros(limits.seqs, dtype=torch.int64, device=self._device)
        self._graphs: dict[int, Pieces] = {}  # by number of rows; they return what the sampler left of the logits
        self._sizes: list[int] = []  # of graphs, by number of rows; 0: none
        self._pieces: dict[int, Pieces] = {}  # by number of tokens, smallest first

    @torch.inference_mode()
    def queue(self, step: Step) -> Queued:
        """Its results are valid until the next step is queued, on the same stream."""
        self._tell_sampler(step)
        count = len(step.sampled_rows)
        if size := self._decode_size(step):
            staged = self._stage(step, size, size)
            self._attention.replay(size, staged)
            staged.delivery.go()
            adjusted, prompts = self._graphs[size].replay(count)[:count], []
        else:
            hidden = self._hidden(step)
            prompts = [self._prompt(hidden[p.first :], p.targets, p.k) for p in step.prompt_rows]
            if step.prompt_rows:
                hidden = hidden[self._inputs.sampled_rows[:count]]
            adjusted = self._sample(hidden[:count])
        tokens = self._samples[:count]
        most = int(step.sampling["logprobs"].max(initial=-1))
        return Queued(tokens, logprobs(adjusted, tokens, most) if most >= 0 else None, prompts)

    def _decode_size(self, step: Step) -> int:
        """Rows of the graph for a step of decodes alone; 0: none."""
        count = len(step.sampled_rows)
        alone = step.num_decode == step.num_seqs == count and not step.prompt_rows
        return self._sizes[count] if alone and count < len(self._sizes) else 0

    def _hidden(self, step: Step) -> Tensor:
        """Of the rows that want logits, first, of a step with chunks of prompts."""
        tokens, wanted = step.num_tokens, len(step.logits_rows)
        size = next((size for size in self._pieces if size >= tokens), 0)
        if not size or wanted > min(size, self._limits.seqs):
            staged = self._stage(step)
            self._attention.prepare(step, staged)
            staged.delivery.go()
            return self._forward(tokens, step.num_decode, None if wanted == tokens else max(1, wanted))
        staged = self._stage(step, 0, size)
        self._attention.prepare(step, staged, pieces=True)
        staged.delivery.go()
        return self._pieces[size].replay(tokens)

    def _stage(self, step: Step, seqs: int = 0, tokens: int = 0) -> Staging:
        """On the host, ready to be delivered with what attention adds."""
        staged = self._stagings[self._turn]
        self._turn = (self._turn + 1) % _STAGINGS
        staged.fill(step, seqs, tokens)
        staged.send(self._inputs, self._sampler.rows, self._sampler.masks)
        return staged

    def _tell_sampler(self, step: Step) -> None:
        for history in step.histories:
            self._sampler.start_history(history.line, self._ids(history.prompt), self._ids(history.output))
        for bias in step.biases:
            values = torch.from_numpy(bias.values).to(self._device)
            self._sampler.set_bias(bias.line, self._ids(bias.tokens), values, only=bias.only)

    def _ids(self, tokens: I32) -> Tensor:
        return torch.from_numpy(tokens).to(self._device, torch.int64)

    def _forward(self, tokens: int, decodes: int, wanted: int | None) -> Tensor:
        """Hidden states of the first ``wanted`` of ``logits_rows``; None: of all tokens."""
        inputs = self._inputs
        kernels.take_samples(inputs.tokens[:decodes], inputs.picks[:decodes], self._samples)
        rows = None if wanted is None else inputs.logits_rows[:wanted]
        return self.model.forward(inputs.tokens[:tokens], inputs.positions[:tokens], self._attention, rows)

    def _sample(self, hidden: Tensor) -> Tensor:
        """Into ``samples``; returns what the sampler left of the logits."""
        if not len(hidden):
            return hidden
        return self._sampler.sample(self.model.logits(hidden), self._samples[: len(hidden)]).adjusted

    def _prompt(self, hidden: Tensor, targets: I32, k: int) -> Logprobs:
        tokens = self._ids(targets)
        slices = [slice(first, min(first + _PROMPT_ROWS, len(tokens))) for first in range(0, len(tokens), _PROMPT_ROWS)]
        parts = [logprobs(self.model.logits(hidden[rows]), tokens[rows], k) for rows in slices]
        return Logprobs(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], pieces: Sequence[int], progress: Callable[[int], None]) -> None:
        """Captures a graph for each number of decodes of ``sizes``, and pieces for each number of tokens, both largest
        first; ``progress`` is told each. Nothing may be queued.
        """
        pool = torch.cuda.graph_pool_handle()
        nobodys = _nobodys(len(self._inputs.slots))
        self._attention.begin_capture(sizes)
        for size in sizes:
            self._stage(nobodys, size, size).delivery.go()
            self._attention.capture(size)
            self._graphs[size] = made = Pieces(pool)
            self._record(made, partial(self._decode, size))
            progress(size)
        ordered = sorted(self._graphs)
        self._sizes = [0, *(next(size for size in ordered if size >= rows) for rows in range(1, ordered[-1] + 1))]
        for size in pieces:
            self._stage(nobodys, 0, size).delivery.go()
            self._pieces[size] = made = Pieces(pool)
            rows = min(size, self._limits.seqs)
            with self._attention.recording(made, size):
                self._record(made, partial(self._forward, size, rows, rows))
            progress(size)
        self._pieces = dict(sorted(self._pieces.items()))

    def _record(self, made: Pieces, forward: Callable[[], Tensor]) -> None:
        with ExitStack() as stack:
            if self._ring is not None:
                stack.enter_context(self._ring.recording(made))
            made.record(forward)

    def _decode(self, size: int) -> Tensor:
        return self._sample(self._forward(size, size, None))

    def close(self) -> None:
        """Lets go of graphs, which hold memory."""
        self._graphs.clear()
        self._pieces.clear()
        self._sizes = []


def _nobodys(num_groups: int) -> Step:
    """A step of no sequence: all of a graph's rows are nobody's."""
    none32, none64 = np.empty(0, np.int32), np.empty(0, np.int64)
    return Step(
        tokens=none64, positions=none64, query_start=np.zeros(1, np.int32), seq_lens=none32,
        slots=[none64] * num_groups, block_tables=[np.empty((0, 1), np.int32)] * num_groups, logits_rows=none64,
        num_decode=0, sampling=np.empty(0, SAMPLING),
    )  # fmt: skip
