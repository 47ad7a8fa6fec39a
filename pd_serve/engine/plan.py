"""From the scheduler's choice of sequences to a :class:`Step`: arrays, no loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pd_serve.compute.step import Step
from pd_serve.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """``num_tokens`` of ``seq`` are computed in this step, from ``seq.num_computed`` on."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one is sampled."""
        return self.seq.num_computed + self.num_tokens == self.seq.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.seq.sampling.prompt_logprobs >= 0 and self.seq.num_computed < self.seq.num_prompt


def build_batch(plan: Seq[Work], block_size: int, num_groups: int) -> Step:
    """Decodes come first in ``plan`` (the scheduler's order). See :class:`Step` for shapes."""
    counts = np.array([w.num_tokens for w in plan], dtype=np.int32)
    starts = np.array([w.seq.num_computed for w in plan], dtype=np.int64)
    query_start = np.zeros(len(plan) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    total = int(query_start[-1])

    row = np.repeat(np.arange(len(plan)), counts)
    positions = np.arange(total, dtype=np.int64) - query_start[row] + starts[row]
    tokens = np.empty(total, dtype=np.int64)
    for i, w in enumerate(plan):
        begin = w.seq.num_computed
        tokens[query_start[i] : query_start[i + 1]] = w.seq.tokens[begin : begin + w.num_tokens]

    seq_lens = (starts + counts).astype(np.int32)
    max_blocks = -(-int(seq_lens.max()) // block_size)
    block_of, offset = positions // block_size, positions % block_size
    tables, slots = [], []
    for group in range(num_groups):
        table = np.zeros((len(plan), max_blocks), dtype=np.int32)
        for i, w in enumerate(plan):
            assert w.seq.blocks is not None  # a planned sequence holds blocks
            count = min(max_blocks, w.seq.blocks.num_blocks)
            table[i, :count] = w.seq.blocks.tables[group][:count]
        tables.append(table)
        slots.append(table[row, block_of].astype(np.int64) * block_size + offset)

    wanted = [
        np.arange(query_start[i], query_start[i + 1])
        if w.wants_prompt_logprobs
        else np.arange(query_start[i + 1] - int(w.samples), query_start[i + 1])
        for i, w in enumerate(plan)
    ]
    num_decode = next((i for i, w in enumerate(plan) if w.num_tokens != 1 or w.seq.num_computed == 0), len(plan))
    return Step(
        tokens=tokens,
        positions=positions,
        query_start=query_start,
        seq_lens=seq_lens,
        slots=slots,
        block_tables=tables,
        logits_rows=np.concatenate(wanted).astype(np.int64),
        num_decode=num_decode,
    )
