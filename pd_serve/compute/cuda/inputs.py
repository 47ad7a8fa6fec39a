"""A step's arrays at fixed places, on the device and, as they leave, on the host: what CUDA graphs are fed from.

The host has two sets of them, so that one can be filled while the other is still on its way. Used by the runner.
"""

from __future__ import annotations

import torch

from pd_serve.compute.cuda.sampler import Rows
from pd_serve.compute.step import Step


class Inputs:
    """All int64, one behind the other: one copy brings them to the device. T, S, G as in :mod:`pd_serve.compute.step`.

    Attributes have room for ``max_tokens`` or ``max_seqs``.
    """

    def __init__(self, max_tokens: int, max_seqs: int, num_groups: int, device: torch.device) -> None:
        """On the host the memory is pinned where there is a GPU."""
        pinned = device.type == "cpu" and torch.cuda.is_available()
        words = (3 + num_groups) * max_tokens + 2 * max_seqs
        self._words = torch.zeros(words, dtype=torch.int64, device=device, pin_memory=pinned)
        by_token = self._words[: words - 2 * max_seqs].view(-1, max_tokens)
        self.tokens, self.positions, self.logits_rows = by_token[:3]  # [T] each
        self.slots = list(by_token[3:])  # a group: [T]; below 0: stored nowhere
        self.picks, self.sampled_rows = self._words[words - 2 * max_seqs :].view(2, max_seqs)  # [S] each

    def copy_from(self, host: Inputs) -> None:
        """Queued on the current stream."""
        self._words.copy_(host._words, non_blocking=True)


class Staging:
    """One set on the host, with what attention and the sampler get."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, num_groups: int) -> None:
        host, pinned = torch.device("cpu"), torch.cuda.is_available()
        self.inputs = Inputs(max_tokens, max_seqs, num_groups, host)
        self.rows = Rows(max_seqs, host)
        self.lens = torch.ones(max_seqs, dtype=torch.int32, pin_memory=pinned)
        self.tables = [
            torch.zeros((max_seqs, max_blocks), dtype=torch.int32, pin_memory=pinned) for _ in range(num_groups)
        ]
        self.masks = torch.empty(0, dtype=torch.int32)  # of the step, flat; memory is taken when there are some
        self._masks = self.masks
        self._max_seqs = max_seqs
        self._left = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fill(self, step: Step, seqs: int = 0, tokens: int = 0) -> None:
        """``seqs``, ``tokens``: of the graphs that will be replayed; what they have beyond the step's is nobody's."""
        if self._left is not None:
            self._left.synchronize()
        used_tokens, used_seqs, inputs = step.num_tokens, step.num_seqs, self.inputs
        inputs.tokens.numpy()[:used_tokens] = step.tokens
        inputs.positions.numpy()[:used_tokens] = step.positions
        inputs.sampled_rows.numpy()[: len(step.sampled_rows)] = step.sampled_rows
        picks, logits_rows = inputs.picks.numpy(), inputs.logits_rows.numpy()
        rows = min(tokens, len(picks))
        picks[: len(step.from_samples)] = step.from_samples
        picks[len(step.from_samples) : max(rows, step.num_decode)] = -1
        logits_rows[: len(step.logits_rows)] = step.logits_rows
        logits_rows[len(step.logits_rows) : rows] = 0
        self.lens.numpy()[:used_seqs] = step.seq_lens
        for slots, staged in zip(step.slots, inputs.slots, strict=True):
            staged.numpy()[:used_tokens] = slots
        for table, whole in zip(step.block_tables, self.tables, strict=True):
            whole.numpy()[:used_seqs, : table.shape[1]] = table
        self._fill_masks(step)
        self.rows.fill(step.sampling, max(seqs, len(step.sampling)))
        self._fill_up_tokens(used_tokens, tokens)
        self._fill_up_seqs(used_seqs, seqs)

    def _fill_masks(self, step: Step) -> None:
        size = len(step.masks)
        if size > len(self._masks):
            words = size // (int(step.sampling["mask"].max()) + 1)
            self._masks = torch.empty(self._max_seqs * words, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self.masks = self._masks[:size]
        self.masks.numpy()[:] = step.masks

    def leaves(self) -> None:
        """All copies of it are queued on the current stream."""
        if self._left is not None:
            self._left.record()

    def _fill_up_tokens(self, used: int, size: int) -> None:
        """Stored nowhere."""
        if size > used:
            inputs = self.inputs
            for array in (inputs.tokens, inputs.positions):
                array[used:size] = 0
            for slots in inputs.slots:
                slots[used:size] = -1

    def _fill_up_seqs(self, used: int, size: int) -> None:
        """They read block 0."""
        if size > used:
            for table in self.tables:
                table[used:size, 0] = 0
            self.lens[used:size] = 1
