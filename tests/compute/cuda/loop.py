"""Steps as an engine makes them, for sequences without an engine: a fixed share of the pool each, no scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pd_serve.compute.step import SAMPLING, SamplingRow, Step

GREEDY = SamplingRow(
    seed=0, temperature=0.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
    top_k=0, logprobs=-1,
)  # fmt: skip


@dataclass
class Line:
    """A sequence: ``tokens`` known to the host, ``done`` of them computed, and so many samples still on the device."""

    tokens: list[int]
    first_block: int
    sampling: SamplingRow = GREEDY
    done: int = 0
    sample_row: int = -1  # of the step before; -1: the host knows its last token
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)


def step_of(work: list[tuple[Line, int]], block_size: int, groups: int, blocks_each: int) -> Step:
    """``work``: lines and how many tokens of each, decodes first. Marks them as computed."""
    counts = np.array([n for _, n in work], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lens = np.array([line.done + n for line, n in work], np.int32)
    tokens = np.zeros(int(starts[-1]), np.int64)
    table = np.stack([np.arange(line.first_block, line.first_block + blocks_each) for line, _ in work]).astype(np.int32)
    row = np.repeat(np.arange(len(work)), counts)
    positions = np.concatenate([np.arange(line.done, line.done + n) for line, n in work]).astype(np.int64)
    picks, samples, sampling = [], [], []
    for i, (line, n) in enumerate(work):
        known = line.tokens[line.done : line.done + n]
        tokens[starts[i] : starts[i] + len(known)] = known
        picks.append(-1 if known else line.sample_row)
        line.done += n
        if line.done >= len(line.tokens):
            line.sample_row = len(samples)
            samples.append(i)
            sampling.append(tuple(line.sampling._replace(output_index=line.done - line.num_prompt)))
    decodes = sum(1 for line, n in work if n == 1 and line.done > line.num_prompt)
    slots = table[row, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return Step(
        tokens=tokens, positions=positions, query_start=starts, seq_lens=lens, slots=[slots] * groups,
        block_tables=[table] * groups, logits_rows=starts[1:][samples].astype(np.int64) - 1, num_decode=decodes,
        from_samples=np.array(picks[:decodes], np.int32), sampled_rows=np.arange(len(samples), dtype=np.int64),
        sampling=np.array(sampling, SAMPLING),
    )  # fmt: skip
