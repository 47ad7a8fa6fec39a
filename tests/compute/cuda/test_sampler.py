"""Sampling on the GPU against the same in numpy: whole sorted rows, double precision, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pd_serve.compute.step import SAMPLING, SamplingRow
from pd_serve.engine.plan import StepBuilder, Work
from pd_serve.engine.sequence import Sequence
from pd_serve.wire.link import SamplingParams
from tests.compute.cuda.device import DEVICE, INTERPRETED, error, same, skip_without_gpu

skip_without_gpu()

from pd_serve.compute.cuda.delivery import copy_now  # noqa: E402
from pd_serve.compute.cuda.sampler import LOWEST_LOGPROB, Rows, Sampler, logprobs  # noqa: E402

pytestmark = pytest.mark.gpu

F64 = npt.NDArray[np.float64]
MASK_64 = (1 << 64) - 1


def params(**kwargs: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "seed": 0, **kwargs})


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def noise(seed: int, index: int, vocab: int) -> F64:
    x = np.uint64(mix(mix(seed) + index)) + np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return -np.log1p(-((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def kept(row: F64, p: SamplingParams) -> F64:
    """Relative weights, 0 for tokens that the filters take out."""
    weights = np.exp((row - row.max()) / p.temperature)
    weights[weights < p.min_p] = 0
    if 0 < p.top_k < len(row):
        weights[weights < np.sort(weights)[-p.top_k]] = 0
    if p.top_p < 1:
        ordered = np.sort(weights)[::-1]
        last = int(np.searchsorted(np.cumsum(ordered), p.top_p * weights.sum()))
        weights[weights < ordered[min(last, len(ordered) - 1)]] = 0
    return weights


def drawn(row: F64, p: SamplingParams, index: int) -> int:
    if p.temperature < 1e-5:
        return int(row.argmax())
    return int((kept(row, p) / noise(p.seed, index, len(row))).argmax())


def row_of(p: SamplingParams, index: int, **lines: int) -> SamplingRow:
    shared = {name: getattr(p, name) for name in SamplingRow._fields if hasattr(p, name)}
    return SamplingRow(**shared, output_index=index, **lines)


def load(sampler: Sampler, rows: list[SamplingRow]) -> None:
    host = Rows(sampler.rows.max_rows, torch.device("cpu"))
    host.fill(np.array([tuple(row) for row in rows], SAMPLING), len(rows))
    sampler.rows.take(host, copy_now)


def sampler_for(rows: list[SamplingParams], vocab: int, indices: list[int] | None = None, **tables: int) -> Sampler:
    sampler = Sampler(vocab, len(rows), DEVICE, **tables)
    load(sampler, [row_of(p, indices[i] if indices else i) for i, p in enumerate(rows)])
    return sampler


FILTERS = [
    {}, {"temperature": 0.3}, {"temperature": 0.0}, {"temperature": 1.7, "seed": 2**64 - 1},
    {"top_k": 1}, {"top_k": 7}, {"top_k": 40, "temperature": 1.3}, {"top_k": 10**6},
    {"top_p": 0.9}, {"top_p": 0.2, "temperature": 2.0}, {"top_p": 1e-9}, {"top_p": 0.99999},
    {"min_p": 0.1}, {"min_p": 0.02, "top_k": 9}, {"min_p": 0.05, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "temperature": 0.8}, {"top_k": 3, "top_p": 0.5, "min_p": 0.001},
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 4.0])  # of logits: equal, flat (too many candidates), peaked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [37, 9001] if INTERPRETED else [37, 4096, 20_011, 128_256])
def test_a_token_is_the_winner_of_its_row(vocab: int, dtype: torch.dtype, spread: float) -> None:
    rows = [params(**{"seed": 11 * i, **f}) for i, f in enumerate(FILTERS)]
    logits = (torch.randn(len(rows), vocab, device=DEVICE) * spread).to(dtype)
    expected = logits.double().cpu().numpy()
    tokens = sampler_for(rows, vocab).sample(logits).tokens.tolist()
    for i, (p, token) in enumerate(zip(rows, tokens, strict=True)):
        wanted = drawn(expected[i], p, i)
        # the last bit of a weight may decide a race; what the filters took out may never win
        if token != wanted:
            weights = kept(expected[i], p)
            scores = weights / noise(p.seed, i, vocab)
            assert scores[token] > scores[wanted] * (1 - 1e-5), (p, token, wanted)


def test_the_cpu_engine_draws_the_same() -> None:
    """A stream may move between a GPU and a CPU node: seeds mean the same on both."""
    from pd_serve.compute.cpu import sampler as cpu

    vocab, index = 3001, 4
    rows = [params(**{"seed": 2**63 + 11 * i, **f}) for i, f in enumerate(FILTERS * (1 if INTERPRETED else 12))]
    logits = torch.randn(len(rows), vocab, device=DEVICE)
    ours = sampler_for(rows, vocab, [index] * len(rows)).sample(logits.clone()).tokens.tolist()
    tokens = np.zeros(8 + index, np.int32)
    seqs = [Sequence(str(i), 1, tokens, 8, p, capacity=16) for i, p in enumerate(rows)]
    step = StepBuilder(16, 0, ()).build([Work(seq, seq.num_tokens - 1, 1, True) for seq in seqs])
    theirs = cpu.Sampler(vocab).sample(step, logits.cpu()).tokens
    ties = sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert ties <= len(rows) // 100, [(p, a, b) for p, a, b in zip(rows, ours, theirs, strict=True) if a != b]


def test_filters_leave_what_they_should() -> None:
    vocab, n = 5000, 40 if INTERPRETED else 500
    logits = torch.randn(vocab, device=DEVICE) * 1.5
    row = logits.double().cpu().numpy()
    for filters in ({"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.3}, {"top_k": 20, "top_p": 0.7}):
        rows = [params(seed=i, **filters) for i in range(n)]
        tokens = sampler_for(rows, vocab).sample(logits.expand(n, -1).clone()).tokens.tolist()
        assert set(tokens) <= set(np.flatnonzero(kept(row, rows[0])).tolist())
        assert len(set(tokens)) > 1


def test_frequencies_are_the_probabilities() -> None:
    vocab, n = 30, 500 if INTERPRETED else 50_000
    logits = torch.randn(vocab, device=DEVICE) * 2
    tokens = sampler_for([params(seed=7)] * n, vocab, list(range(n))).sample(logits.expand(n, -1).clone()).tokens
    expected = torch.softmax(logits.double(), 0) * n
    counts = torch.bincount(tokens, minlength=vocab).double()
    usual = expected >= 5
    chi2 = ((counts - expected)[usual].square() / expected[usual]).sum().item()
    freedom = int(usual.sum()) - 1
    assert chi2 < freedom + 6 * math.sqrt(2 * freedom)


def test_the_rest_of_the_batch_does_not_matter() -> None:
    vocab = 6000
    rows = [params(**{"seed": 3 + i, **f}) for i, f in enumerate(FILTERS)]
    indices = [5 * i for i in range(len(rows))]
    logits = torch.randn(len(rows), vocab, device=DEVICE)
    together = sampler_for(rows, vocab, indices).sample(logits.clone()).tokens.tolist()
    order = torch.randperm(len(rows)).tolist()
    shuffled = sampler_for([rows[i] for i in order], vocab, [indices[i] for i in order]).sample(logits[order])
    assert shuffled.tokens.tolist() == [together[i] for i in order]
    for i in range(0, len(rows), 3):
        alone = sampler_for([rows[i]], vocab, [indices[i]]).sample(logits[i : i + 1].clone())
        assert alone.tokens.tolist() == [together[i]]


def test_another_seed_or_index_gives_another_token() -> None:
    vocab, n = 5000, 20
    logits = torch.zeros(n, vocab, device=DEVICE)
    by_index = sampler_for([params(seed=1)] * n, vocab).sample(logits.clone()).tokens.tolist()
    by_seed = sampler_for([params(seed=i) for i in range(n)], vocab, [0] * n).sample(logits.clone()).tokens.tolist()
    assert len(set(by_index)) > n - 3
    assert len(set(by_seed)) > n - 3


def test_the_first_of_equals_wins_a_greedy_row() -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[0, [4500, 8999]] = 1
    logits[1, [3, 4500]] = 2
    assert sampler_for([params(temperature=0)] * 2, 9000).sample(logits).tokens.tolist() == [4500, 3]


@pytest.mark.parametrize("p", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.01}], ids=str)
def test_a_mask_forbids_whatever_else_is_asked_for(p: dict[str, Any]) -> None:
    vocab, allowed = 4501, [3, 31, 32, 4095, 4096, 4500]
    rows = [params(**p), params(seed=5, **p), params(seed=6, **p)]
    sampler = Sampler(vocab, len(rows), DEVICE)
    load(sampler, [row_of(p, 0, **line) for p, line in zip(rows, ({"mask": 1}, {}, {"mask": 0}), strict=True)])
    bits = np.zeros((2, sampler.masks.shape[1] * 32), np.uint8)
    bits[1, allowed] = 1
    sampler.masks[:2] = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    logits = torch.randn(len(rows), vocab, device=DEVICE) * 3
    expected = logits.double().cpu().numpy()
    expected[0, [token for token in range(vocab) if token not in allowed]] = -np.inf

    sampled = sampler.sample(logits)

    assert sampled.tokens[:2].tolist() == [drawn(expected[i], rows[i], 0) for i in (0, 1)]
    assert np.isneginf(sampled.adjusted[0].cpu().numpy()).sum() == vocab - len(allowed)
    assert 0 <= sampled.tokens[2].item() < vocab  # what permits nothing gives anything


def test_nothing_but_what_is_allowed_is_sampled() -> None:
    vocab, allowed = 4500, [2, 7, 30, 4400]
    filters = [{"temperature": 0}, {}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.01}, {"top_k": 3, "top_p": 0.9}]
    rows = [params(seed=seed, **{"temperature": 5.0, **more}) for seed, more in enumerate(filters)]
    sampler = Sampler(vocab, len(rows), DEVICE, biases=1)
    logits = torch.randn(1, vocab, device=DEVICE).repeat(len(rows), 1)
    expected = np.full(vocab, -np.inf)
    expected[allowed] = logits[0, allowed].double().cpu().numpy()
    sampler.set_bias(0, torch.tensor(allowed, device=DEVICE), torch.zeros(len(allowed), device=DEVICE), only=True)
    load(sampler, [row_of(p, 3, bias=0) for p in rows])
    assert sampler.sample(logits).tokens.tolist() == [drawn(expected, p, 3) for p in rows]


def test_bias_penalties_and_histories() -> None:
    vocab = 4500
    rows = [
        params(temperature=0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3),
        params(seed=5, frequency_penalty=-0.5),
        params(temperature=0),
    ]
    sampler = Sampler(vocab, len(rows), DEVICE, histories=3, biases=2)
    prompt, output = torch.tensor([4, 4, 17, 4400]), torch.tensor([17, 9, 9, 9])
    for line in (0, 2):
        sampler.start_history(line, prompt.to(DEVICE), output.to(DEVICE))
    sampler.start_history(1, prompt.to(DEVICE), output[:0].to(DEVICE))
    biased = torch.tensor([7, 4400, 9, 11], device=DEVICE)
    sampler.set_bias(1, biased, torch.tensor([3.5, -2.0, -torch.inf, -torch.inf], device=DEVICE))
    lines = ({"history": 2, "bias": 1}, {"history": 0}, {"bias": 1})
    load(sampler, [row_of(p, 0, **line) for p, line in zip(rows, lines, strict=True)])
    logits = torch.randn(len(rows), vocab, device=DEVICE) * 3
    expected = logits.double().cpu()

    sampled = sampler.sample(logits)

    for row in (0, 2):
        expected[row, 7] += 3.5
        expected[row, 4400] -= 2
        expected[row, [9, 11]] = -torch.inf
    seen = torch.tensor([4, 9, 17, 4400])
    expected[0, seen] = torch.where(expected[0, seen] > 0, expected[0, seen] / 1.7, expected[0, seen] * 1.7)
    expected[0, 17] -= 0.7
    expected[1, 17] += 0.5
    expected[1, 9] += 1.5
    expected[0, 9] = -torch.inf
    finite = expected.isfinite()
    assert torch.equal(finite, sampled.adjusted.isfinite().cpu())
    assert error(sampled.adjusted.cpu()[finite], expected[finite]) < 1e-6
    tokens = sampled.tokens.tolist()
    assert tokens == [drawn(expected[i].numpy(), p, 0) for i, p in enumerate(rows)]
    counts = torch.zeros(3, vocab, dtype=torch.int32)
    for line, out in ((0, output.tolist()), (1, []), (2, output.tolist())):
        counts[line, prompt.unique()] = 1
        for token in out:
            counts[line, token] += 2
    counts[2, tokens[0]] += 2
    counts[0, tokens[1]] += 2
    assert torch.equal(sampler.histories.cpu(), counts)


def test_logprobs() -> None:
    logits = torch.randn(5, 3000, device=DEVICE)
    logits[2, 5] = -torch.inf
    tokens = torch.tensor([0, 1, 5, 2999, int(logits[4].argmax())], device=DEVICE)
    found = logprobs(logits, tokens, 20)
    expected = torch.log_softmax(logits.double(), 1)
    wanted = expected.gather(1, tokens[:, None])[:, 0].clamp_min(LOWEST_LOGPROB)
    assert error(found.chosen, wanted) < 1e-6
    assert found.rank.tolist() == [int((row > row[t]).sum()) + 1 for row, t in zip(logits, tokens, strict=True)]
    assert found.rank[4] == 1
    assert same(found.top_tokens, logits.topk(20, 1).indices)
    assert error(found.top, expected.topk(20, 1).values) < 1e-6


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
def test_in_a_graph() -> None:
    vocab, n = 32_000, len(FILTERS)
    sampler = Sampler(vocab, n, DEVICE)
    logits = torch.zeros(n, vocab, device=DEVICE)
    out = torch.empty(n, dtype=torch.int64, device=DEVICE)
    sampler.sample(logits, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(logits, out)
    for step in range(3):
        rows = [params(**{"seed": 100 * step + i, **f}) for i, f in enumerate(FILTERS)]
        eager = sampler_for(rows, vocab)
        sampler.rows.take(eager.rows, copy_now)
        values = torch.randn(n, vocab, device=DEVICE)
        logits.copy_(values)
        graph.replay()
        assert out.tolist() == eager.sample(values).tokens.tolist()
