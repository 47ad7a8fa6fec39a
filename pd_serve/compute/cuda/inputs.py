"""A step's arrays at fixed places, on the device and, as they leave, on the host: what CUDA graphs are fed from.

The host has two sets of them, so that one can be filled while the other is still on its way. Used by the runner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.compute.cuda.delivery import Delivery
from pd_serve.compute.cuda.sampler import Rows
from pd_serve.compute.step import Step


class Inputs:
    """All int64. T, S, G as in :mod:`pd_serve.compute.step`. There is room for ``max_tokens`` or ``max_seqs``."""

    def __init__(self, max_tokens: int, max_seqs: int, num_groups: int, device: torch.device) -> None:
        """On the host the memory is pinned where there is a GPU."""
        pinned = device.type == "cpu" and torch.cuda.is_available()
        words = (3 + num_groups) * max_tokens + 2 * max_seqs
        all_words = torch.zeros(words, dtype=torch.int64, device=device, pin_memory=pinned)
        self.by_token = all_words[: words - 2 * max_seqs].view(-1, max_tokens)
        self.tokens, self.positions, self.logits_rows = self.by_token[:3]  # [T] each
        self.slots = list(self.by_token[3:])  # a group: [T]; below 0: stored nowhere
        self.by_seq = all_words[words - 2 * max_seqs :].view(2, max_seqs)
        self.picks, self.sampled_rows = self.by_seq  # [S] each


class Staging:
    """One set on the host, with what attention and the sampler get, and its way to the device."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, num_groups: int, device: torch.device) -> None:
        host, pinned = torch.device("cpu"), torch.cuda.is_available()
        self.delivery = Delivery(device)
        self.inputs = Inputs(max_tokens, max_seqs, num_groups, host)
        self.rows = Rows(max_seqs, host)
        self.num_blocks = 1  # columns of tables that are filled
        self.lens = torch.ones(max_seqs, dtype=torch.int32, pin_memory=pinned)
        self.tables = [
            torch.zeros((max_seqs, max_blocks), dtype=torch.int32, pin_memory=pinned) for _ in range(num_groups)
        ]
        self.masks = torch.empty(0, dtype=torch.int32)  # of the step, flat; memory is taken when there are some
        self._masks = self.masks
        self._max_seqs = max_seqs
        self._num_tokens = self._num_seqs = 0  # that are filled

    def fill(self, step: Step, seqs: int = 0, tokens: int = 0) -> None:
        """``seqs``, ``tokens``: of the graphs that will be replayed; what they have beyond the step's is nobody's."""
        self.delivery.begin()
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
        self._num_tokens = max(used_tokens, tokens, len(step.logits_rows))
        self._num_seqs = max(rows, step.num_decode, len(step.sampled_rows))
        self.lens.numpy()[:used_seqs] = step.seq_lens
        for slots, staged in zip(step.slots, inputs.slots, strict=True):
            staged.numpy()[:used_tokens] = slots
        for table, whole in zip(step.block_tables, self.tables, strict=True):
            whole.numpy()[:used_seqs, : table.shape[1]] = table
        self.num_blocks = max(1, *(table.shape[1] for table in step.block_tables))
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

    def send(self, inputs: Inputs, rows: Rows, masks: Tensor) -> None:
        """To these, on the device, when :attr:`delivery` goes."""
        send, tokens, seqs = self.delivery.add, self._num_tokens, self._num_seqs
        send(inputs.by_token[:, :tokens], self.inputs.by_token[:, :tokens])
        send(inputs.by_seq[:, :seqs], self.inputs.by_seq[:, :seqs])
        rows.take(self.rows, send)
        if len(self.masks):
            send(masks.view(-1)[: len(self.masks)], self.masks)

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
