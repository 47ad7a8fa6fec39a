"""One step's work as plain arrays: everything the model, the attention and the sampler need.

Sequences with exactly one new token whose prompt is computed come first (``num_decode`` of them), then
prefill chunks. T = new tokens, B = sequences, N = rows of logits wanted, G = layer groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass
class Batch:
    tokens: I64  # [T] token ids
    positions: I64  # [T] position of each token in its sequence
    query_start: I32  # [B + 1] first row of each sequence in T
    seq_lens: I32  # [B] context length of each sequence, this step's tokens included
    slots: list[I64]  # a group: [T] block * block_size + offset, where the token's K and V go
    block_tables: list[I32]  # a group: [B, max blocks of this step], 0 = no block (before a window, or padding)
    logits_rows: I64  # [N] rows of T whose logits are wanted
    num_decode: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)
