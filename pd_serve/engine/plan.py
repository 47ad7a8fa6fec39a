"""From the scheduler's choice of sequences to a :class:`~pd_serve.compute.step.Step`: arrays, no loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from pd_serve.compute.step import SAMPLING, History, PromptRows, Rows, SamplingRow, Step
from pd_serve.engine import adjust
from pd_serve.engine.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Work:
    """``num_tokens`` of ``seq`` are computed in one step, from position ``start`` on."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the step reaches the sequence's last token, so that a new one is sampled

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_targets(self) -> int:
        """Prompt tokens whose log-probabilities come of it: the prompt's last token predicts output."""
        if self.seq.sampling.prompt_logprobs < 0:
            return 0
        return max(0, min(self.num_tokens, self.seq.num_prompt - 1 - self.start))


@dataclass
class _Told:
    """What the sampler knows of a sequence beyond its row."""

    line: int
    history: bool = False
    never: frozenset[int] | None = None  # what its bias forbids; None: no bias yet


class StepBuilder:
    """Makes steps for an executor, which keeps histories and biases of sequences in lines that are given out here."""

    def __init__(self, block_size: int, num_groups: int, eos_token_ids: tuple[int, ...]) -> None:
        self._block_size = block_size
        self._num_groups = num_groups
        self._eos = eos_token_ids
        self._told: dict[Sequence, _Told] = {}

    def build(self, works: Seq[Work]) -> Step:
        """Decodes come first in ``works`` (the scheduler's order). See :class:`Step` for shapes."""
        counts = np.array([w.num_tokens for w in works], dtype=np.int32)
        starts = np.array([w.start for w in works], dtype=np.int64)
        query_start = np.zeros(len(works) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        row = np.repeat(np.arange(len(works)), counts)
        positions = np.arange(total, dtype=np.int64) - query_start[row] + starts[row]
        tokens = np.zeros(total, dtype=np.int64)
        waiting = []  # rows whose token is not known yet
        for i, w in enumerate(works):
            if w.end <= w.seq.num_tokens:
                tokens[query_start[i] : query_start[i + 1]] = w.seq.tokens[w.start : w.end]
            else:
                waiting.append(i)
        num_decode = next((i for i, w in enumerate(works) if w.num_tokens != 1 or w.start == 0), len(works))
        seq_lens = (starts + counts).astype(np.int32)
        tables = self._tables(works, -(-int(seq_lens.max()) // self._block_size))
        block_of, offset = positions // self._block_size, positions % self._block_size
        step = Step(
            tokens=tokens,
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            slots=[table[row, block_of].astype(np.int64) * self._block_size + offset for table in tables],
            block_tables=tables,
            logits_rows=query_start[1:].astype(np.int64) - 1,
            num_decode=num_decode,
        )
        if waiting:
            step.from_samples = np.full(num_decode, -1, np.int32)
            step.from_samples[waiting] = [works[i].seq.sample_row for i in waiting]
        self._choose_rows(step, works)
        self._say_how_to_sample(step, [w for w in works if w.samples])
        return step

    def forget(self, works: Seq[Work]) -> None:
        """The sampler may or may not have done what a step with these said: tell it anew."""
        for work in works:
            self._told.pop(work.seq, None)

    def _tables(self, works: Seq[Work], max_blocks: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.int32]]]:
        tables = []
        for group in range(self._num_groups):
            table = np.zeros((len(works), max_blocks), dtype=np.int32)
            for i, w in enumerate(works):
                assert w.seq.blocks is not None  # a planned sequence holds blocks
                held = min(max_blocks, w.seq.blocks.num_blocks)
                table[i, :held] = w.seq.blocks.tables[group][:held]
            tables.append(table)
        return tables

    def _choose_rows(self, step: Step, works: Seq[Work]) -> None:
        """Which logits are wanted, and what for."""
        targets = [w.num_targets for w in works]
        if not any(targets):
            samples = [w.samples for w in works]
            if not all(samples):
                step.logits_rows = step.logits_rows[np.array(samples)]
            step.sampled_rows = np.arange(len(step.logits_rows))
            return
        wanted, sampled, first = [], [], 0
        for w, num_targets, begin, last in zip(works, targets, step.query_start, step.logits_rows, strict=False):
            wanted += [np.arange(begin, begin + num_targets), np.array([last][: int(w.samples)], np.int64)]
            if num_targets:
                next_tokens = w.seq.tokens[w.start + 1 : w.start + 1 + num_targets]
                step.prompt_rows.append(PromptRows(first, next_tokens, w.seq.sampling.prompt_logprobs))
            first += num_targets
            if w.samples:
                sampled.append(first)
                first += 1
        step.logits_rows = np.concatenate(wanted).astype(np.int64)
        step.sampled_rows = np.array(sampled, np.int64)

    def _say_how_to_sample(self, step: Step, works: Seq[Work]) -> None:
        if not works:
            return
        rows = step.sampling = np.concatenate([_row_of(w.seq) for w in works])
        rows["output_index"] = [w.end - w.seq.num_prompt for w in works]
        masks: list[npt.NDArray[np.int32]] = []
        for i, work in enumerate(works):
            work.seq.sample_row = i
            constraint = work.seq.constraint
            if constraint is not None and constraint.mask is not None:
                rows["mask"][i] = len(masks)
                masks.append(constraint.mask)
            if work.seq.adjusted:
                self._say_more(step, i, work)
        if masks:
            step.masks = np.concatenate(masks)

    def _say_more(self, step: Step, row: int, work: Work) -> None:
        seq, params = work.seq, work.seq.sampling
        told = self._told.get(seq) or self._take_line(seq)
        if adjust.penalises(params):
            step.sampling["history"][row] = told.line
            if not told.history:
                told.history = True
                step.histories.append(History(told.line, seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]))
        if not adjust.biases(params):
            return
        index = work.end - seq.num_prompt
        if seq.constraint is not None and seq.constraint.stopped:
            index = max(index, params.min_tokens)  # nothing but an end may come
        # the last token may not be known yet, where nothing but their number matters
        never = adjust.forbidden(params, seq.tokens[seq.num_prompt :], index, self._eos)
        if never or params.logit_bias or params.allowed_token_ids:
            step.sampling["bias"][row] = told.line
            if told.never != never:
                told.never = never
                step.biases.append(adjust.bias(told.line, params, never))

    def _take_line(self, seq: Sequence) -> _Told:
        """The lowest that no running sequence has: there are never more than such sequences."""
        self._told = {other: told for other, told in self._told.items() if other.state is State.RUNNING}
        taken = {told.line for told in self._told.values()}
        told = self._told[seq] = _Told(next(line for line in count() if line not in taken))
        return told


def _row_of(seq: Sequence) -> Rows:
    """``[1]`` of what is the same for all of its tokens."""
    if seq.sampling_row is None:
        values = (getattr(seq.sampling, name) for name in SamplingRow._fields[:-4])
        seq.sampling_row = np.array([tuple(SamplingRow(*values))], SAMPLING)
    return seq.sampling_row
