"""The sampler: filters against a plain reference, distributions, independence of the batch, penalties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.compute.cpu.sampler import LOWEST_LOGPROB, Sampler, noise_key
from pd_serve.compute.cpu.sampling_kernels import draw_any
from pd_serve.compute.step import Sampled, Step
from pd_serve.engine.plan import StepBuilder, Work
from pd_serve.engine.sequence import Sequence, State
from pd_serve.wire.link import SamplingParams

VOCAB = 3000
EOS = (7, 9)
F64 = npt.NDArray[np.float64]


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    tokens = np.array((prompt or [1, 2]) + (output or []), np.int32)
    sampling = SamplingParams(**{"max_tokens": 100, "seed": 0, **params})
    return Sequence("id", 1, tokens, len(prompt or [1, 2]), sampling, capacity=len(tokens) + 100)


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def step(*seqs: Sequence, builder: StepBuilder | None = None) -> Step:
    """The last token of each is computed, and one more sampled."""
    works = [Work(seq, seq.num_tokens - 1, 1, True) for seq in seqs]
    return (builder or StepBuilder(16, 0, EOS)).build(works)


def sample_all(logits: torch.Tensor, *seqs: Sequence) -> Sampled:
    return Sampler(logits.shape[1]).sample(step(*seqs), logits)


def sample(logits: torch.Tensor, *seqs: Sequence, eos: tuple[int, ...] = EOS) -> list[int]:
    found = step(*seqs, builder=StepBuilder(16, 0, eos))
    return Sampler(logits.shape[1]).sample(found, logits.clone()).tokens


def filtered(logits: F64, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> F64:
    """Probabilities as vLLM filters them: min_p, top_k, top_p, each on what the one before left."""
    p = np.exp((logits - logits.max()) / temperature)
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return np.asarray(p / p.sum())


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.7},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.999, "min_p": 0.001},
]


@pytest.mark.parametrize("params", FILTERS)
def test_draws_follow_the_filtered_distribution(params: dict[str, Any]) -> None:
    """Chi-square over fixed seeds, and nothing that the filters remove."""
    logits = random_logits(1, vocab=40, scale=2.0)
    draws, rows = 8000, 1000
    counts = np.zeros(40)
    for first in range(0, draws, rows):
        seqs = [sequence(seed=first + i, **params) for i in range(rows)]
        counts += np.bincount(sample(logits.repeat(rows, 1), *seqs), minlength=40)
    p = filtered(logits[0].double().numpy(), **params)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * draws
    common = expected >= 5
    chi_square = ((counts[p > 0] - expected)[common] ** 2 / expected[common]).sum()
    freedom = max(1, common.sum() - 1)
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 8),
    temperature=st.floats(0.05, 3),
    top_k=st.sampled_from([0, 1, 2, 40, 2999, 3000, 5000]),
    top_p=st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.01, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_only_what_the_filters_keep_is_drawn(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, scale=scale, seed=seed)
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    exact = logits[0].double().numpy()
    # a little wider than exact, as float32 may round what lies on the edge to either side
    wide = {**params, "top_k": min(top_k, VOCAB), "top_p": min(1.0, top_p * (1 + 1e-4)), "min_p": min_p * (1 - 1e-5)}
    allowed = filtered(exact, **wide) > 0
    tokens = sample(logits.repeat(20, 1), *[sequence(seed=s, **params) for s in range(20)])
    assert allowed[tokens].all()


def test_the_whole_distribution_can_be_reached() -> None:
    """Quantiles from 0 to 1 pick tokens in a fixed order, from the first to the last that is kept."""
    logits = torch.zeros(1, 10)
    seen = {sample(logits, sequence(seed=seed, top_p=0.95))[0] for seed in range(300)}
    assert seen == set(range(10))


def test_equal_logits_at_the_border_of_top_k_are_all_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    seen = {sample(logits, sequence(seed=seed, top_k=2))[0] for seed in range(300)}
    assert seen == {0, 2, 3, 4}


def test_the_batch_changes_nothing() -> None:
    logits = random_logits(16)
    seqs = [sequence(seed=i * 7919, output=[5] * i, **FILTERS[i % len(FILTERS)]) for i in range(16)]
    together = sample(logits, *seqs)
    assert together == [sample(logits[i : i + 1], seqs[i])[0] for i in range(16)]
    assert together[::-1] == sample(logits.flip(0), *seqs[::-1])


def test_seed_and_output_index_decide() -> None:
    logits = random_logits(1, scale=0.1)
    tokens = {(s, n): sample(logits, sequence(seed=s, output=[3] * n))[0] for s in range(20) for n in range(20)}
    assert len(set(tokens.values())) > 350  # of 400 draws from 3,000 nearly equal tokens
    # a resumed attempt: the same output, told as prompt and output of an earlier attempt
    assert tokens[4, 3] == sample(logits, sequence(prompt=[1, 2], output=[3, 3, 3], seed=4))[0]
    keys = {int(noise_key(s, n)) for s in (0, 1, 2**64 - 1) for n in range(2000)}
    assert len(keys) == 6000


@pytest.mark.parametrize("params", [{}, {"top_k": 200}, {"top_p": 0.9}, {"temperature": 0.7, "min_p": 0.01}])
def test_rounding_flips_only_near_ties(params: dict[str, Any]) -> None:
    """Logits of another batch size differ in their last bits. A draw may change only where the noise left a tie."""
    logits = random_logits(1, scale=0.5)  # flat: each running sum of weights would shift
    other = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    rows = 2000
    seqs = [sequence(seed=seed, **params) for seed in range(rows)]
    first, second = (sample(each.repeat(rows, 1), *seqs) for each in (logits, other))
    flipped = [i for i in range(rows) if first[i] != second[i]]
    assert len(flipped) <= 1  # about one of 10,000 is within 1e-5 of a tie or of the filters' edge
    for i in flipped:
        assert abs(score(logits, seqs[i], first[i]) - score(logits, seqs[i], second[i])) < 1e-4 or "top_p" in params


def score(logits: torch.Tensor, seq: Sequence, token: int) -> float:
    """What the draw maximises, written for reading."""
    mask = 2**64 - 1
    x = (int(noise_key(seq.sampling.seed, seq.output_index)) + (token + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    v = (((x ^ (x >> 31)) >> 12) + 0.5) * 2.0**-52
    return float(logits[0, token].double()) / seq.sampling.temperature - math.log(-math.log1p(-v))


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_a_draw_is_the_argmax_of_logits_and_noise(scale: float) -> None:
    """The kernel looks at a few tokens only: it must never miss the best one."""
    logits = random_logits(1, vocab=2500, scale=scale)
    for seed in range(30):
        seq = sequence(seed=seed, output=[1] * (seed % 3), temperature=0.5 + seed / 20)
        assert sample(logits, seq) == [max(range(2500), key=lambda token: score(logits, seq, token))]


def test_rare_tokens_come_as_often_as_they_should() -> None:
    """A thousand tokens of probability 1e-6 each: coarse noise would never draw them, or too often."""
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, 2000:] = math.log(1e-6)
    logits[0, 5] = math.log(1 - 1e-3)
    rows, kernel_row = 40_000, logits[0].numpy()
    rare = sum(draw_any(kernel_row, 1.0, 0.0, noise_key(seed, 0)) >= 2000 for seed in range(rows))
    assert abs(rare - 40) < 4 * 40**0.5


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = random_logits(3)
    logits[1, [44, 50]] = 99.0
    greedy = [sequence(temperature=t) for t in (0.0, 0.0, 1e-7)]
    assert sample(logits, *greedy) == logits.argmax(1).tolist()


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    seq = sequence([5, 6, 6, 8], [8, 20], temperature=0.0, logprobs=20, repetition_penalty=penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    logits[0, [5, 6, 8, 20]] = torch.tensor([14.0, 13.0, -1.0, 12.5])
    expected = processor(torch.tensor([[5, 6, 6, 8, 8, 20]]), logits.clone()).log_softmax(-1)[0]
    found = sample_all(logits.clone(), seq).logprobs[0]
    assert found is not None
    for token, logprob in found.top:
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)


def test_presence_and_frequency_count_output_only_and_keep_up_with_it() -> None:
    seq = sequence([5, 5, 6], [6, 8, 8], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    seq.state = State.RUNNING
    sampler, builder = Sampler(VOCAB), StepBuilder(16, 0, EOS)

    def adjusted(then: int) -> torch.Tensor:
        """The logits that ``then`` is sampled from, which were 0, or 90 for it."""
        rows = torch.zeros(1, VOCAB)
        rows[0, then] = 90.0
        assert sampler.sample(step(seq, builder=builder), rows).tokens == [then]
        seq.append(then)
        return rows[0]

    assert adjusted(20)[[5, 6, 8, 9]].tolist() == [0.0, -0.75, -1.0, 0.0]
    for token in (8, 5, *range(100, 190)):  # more distinct tokens than there was room for at first
        adjusted(token)
    incremental = adjusted(30)
    assert incremental[[5, 6, 8, 20, 100]].tolist() == [-0.75, -0.75, -1.25, -0.75, -0.75]
    builder.forget([Work(seq, 0, 1, True)])  # as after a failed step
    seq.num_tokens -= 1
    assert torch.equal(adjusted(30), incremental)


def test_lines_of_the_tables_are_as_few_as_running_sequences() -> None:
    builder = StepBuilder(16, 0, EOS)
    seqs = [sequence(logit_bias={i: 1.0}, presence_penalty=1.0) for i in range(4)]
    for seq in seqs:
        seq.state = State.RUNNING
    assert step(*seqs[:3], builder=builder).sampling["history"].tolist() == [0, 1, 2]
    seqs[1].state = State.FINISHED
    found = step(seqs[0], seqs[3], builder=builder)
    assert found.sampling["history"].tolist() == found.sampling["bias"].tolist() == [0, 1]
    assert [h.line for h in found.histories] == [b.line for b in found.biases] == [1]  # what is known is not told again


def test_history_grows() -> None:
    seq = sequence(list(range(100, 1400)), [100], temperature=0.0, repetition_penalty=2.0, presence_penalty=1.0)
    rows = torch.ones(1, VOCAB)
    sample_all(rows, seq)
    assert rows[0, 99] == 1 and rows[0, 100] == -0.5 and (rows[0, 101:1400] == 0.5).all() and rows[0, 1400] == 1


def test_logit_bias_and_min_tokens() -> None:
    logits = random_logits(1)
    logits[0, 7] = 50.0
    assert sample(logits, sequence(temperature=0.0)) == [7]
    assert sample(logits, sequence(temperature=0.0, logit_bias={11: 100.0})) == [11]
    assert sample(logits, sequence(temperature=0.0, logit_bias={7: -100.0}))[0] != 7
    # EOS is masked until min_tokens are output, unless it does not end the sequence
    assert sample(logits, sequence(temperature=0.0, min_tokens=2))[0] != 7
    assert sample(logits, sequence(output=[4], temperature=0.0, min_tokens=2))[0] != 7
    assert sample(logits, sequence(output=[4, 4], temperature=0.0, min_tokens=2)) == [7]
    assert sample(logits, sequence(temperature=0.0, min_tokens=2, ignore_eos=True)) == [7]
    assert sample(logits, sequence(temperature=0.0, min_tokens=2, ignore_eos=True, stop_token_ids=(7,)))[0] != 7
    assert sample(logits, sequence(temperature=0.0, min_tokens=5), eos=()) == [7]
    for seed in range(50):  # random draws too
        assert sample(logits, sequence(seed=seed, min_tokens=1, top_k=5, temperature=9.0))[0] not in EOS


def test_nothing_but_what_is_allowed_is_sampled() -> None:
    logits, allowed = random_logits(1), (2, 7, 30, 31, 2999)
    best = max(allowed, key=lambda id: logits[0, id])
    assert sample(logits, sequence(temperature=0.0, allowed_token_ids=allowed)) == [best]
    assert sample(logits, sequence(temperature=0.0, allowed_token_ids=allowed, logit_bias={31: 99.0, 5: 100.0})) == [31]
    assert sample(logits, sequence(temperature=0.0, allowed_token_ids=(7, 8), min_tokens=1)) == [8]  # 7 is an end
    assert sample(logits, sequence(temperature=0.0, allowed_token_ids=(7,), min_tokens=1)) == [7]  # the rest never is
    for filters in ({}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.01}, {"top_k": 4, "top_p": 0.9}):
        seqs = [sequence(seed=seed, temperature=5.0, allowed_token_ids=allowed, **filters) for seed in range(100)]
        drawn = set(sample(logits.repeat(100, 1), *seqs))
        assert drawn <= set(allowed) and len(drawn) > 2
    scores = sample_all(logits.clone(), sequence(temperature=0.0, allowed_token_ids=allowed, logprobs=20)).logprobs[0]
    assert scores is not None and [id for id, value in scores.top if value > LOWEST_LOGPROB] == sorted(
        allowed, key=lambda id: -logits[0, id]
    )


def test_bad_words_are_forbidden_where_they_would_end() -> None:
    logits = random_logits(1)
    logits[0, [20, 21]] = torch.tensor([50.0, 40.0])
    for words, output, expected in (
        (((20,),), [], 21),
        (((20,),), [5, 5, 5], 21),
        (((3, 4, 20),), [], 20),
        (((3, 4, 20),), [4], 20),
        (((3, 4, 20),), [3, 4], 21),
        (((3, 4, 20),), [9, 3, 4], 21),
        (((3, 4, 20),), [3, 4, 9], 20),
        (((20, 20),), [20], 21),
        (((20, 20), (21,)), [20, 9], 20),
    ):
        assert sample(logits, sequence(output=output, temperature=0.0, bad_words=words)) == [expected], (words, output)
    assert sample(logits, sequence([3, 4], temperature=0.0, bad_words=((3, 4, 20),))) == [
        20
    ]  # the prompt is not output
    # what is forbidden comes and goes within one sequence, beside what always is
    sampler, builder = Sampler(VOCAB), StepBuilder(16, 0, EOS)
    seq = sequence(temperature=0.0, bad_words=((20, 20), (21,)), min_tokens=2)
    logits[0, 22], logits[0, 7] = 30.0, 60.0
    for expected in (20, 22, 7, 7):
        assert sampler.sample(step(seq, builder=builder), logits.clone()).tokens == [expected]
        seq.append(expected)


def test_logprobs_rank_and_top_are_of_the_logits_before_temperature() -> None:
    logits = random_logits(2)
    seqs = [sequence(temperature=5.0, seed=3, logprobs=4), sequence(temperature=0.0, logprobs=0)]
    sampled = sample_all(logits.clone(), *seqs)
    exact = logits.double().log_softmax(-1)
    for row, (token, entry) in enumerate(zip(sampled.tokens, sampled.logprobs, strict=True)):
        assert entry is not None and entry.token == token
        assert entry.logprob == pytest.approx(exact[row, token].item(), abs=1e-5)
        assert entry.rank == int((logits[row] > logits[row, token]).sum()) + 1
    first, second = sampled.logprobs
    assert first is not None and second is not None and second.top == [] and second.rank == 1
    best = exact[0].topk(4)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sample_all(logits.clone(), sequence(), sequence()).logprobs == [None, None]


def test_masked_tokens_have_a_finite_logprob() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, :3] = 1.0
    entry = sample_all(logits, sequence(logprobs=5)).logprobs[0]
    assert entry is not None and entry.top[-1][1] == LOWEST_LOGPROB


def test_prompt_logprobs() -> None:
    logits = random_logits(5)
    entries = Sampler(VOCAB).logprobs(logits, [4, 9, 0, 2999, 8], 2)
    exact = logits.double().log_softmax(-1)
    assert [e.token for e in entries] == [4, 9, 0, 2999, 8]
    assert [e.logprob for e in entries] == pytest.approx([exact[i, e.token].item() for i, e in enumerate(entries)])
    assert all(len(e.top) == 2 for e in entries)


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.7, "min_p": 0.1}])
def test_a_mask_forbids_whatever_else_is_asked_for(params: dict[str, Any]) -> None:
    vocab, allowed = 1001, [3, 31, 32, 1000]
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[allowed] = 1
    found = step(sequence(seed=1, logprobs=8, logit_bias={5: 100.0, 31: 1.0}, **params), sequence(**params))
    found.masks = np.packbits(bits, bitorder="little").view(np.int32)
    found.sampling["mask"][0] = 0
    logits = random_logits(2, vocab)
    free = Sampler(vocab).sample(step(sequence(**params)), logits[1:].clone()).tokens
    sampled = Sampler(vocab).sample(found, logits.clone())
    assert sampled.tokens[0] in allowed and sampled.tokens[1:] == free
    assert sampled.logprobs[0] is not None
    top = dict(sampled.logprobs[0].top)
    assert sum(math.exp(top[token]) for token in allowed) == pytest.approx(1, abs=1e-5)
    assert set(top.values()) - {top[token] for token in allowed} == {LOWEST_LOGPROB}
    found.masks[:] = 0  # what permits nothing gives anything, and no exception
    Sampler(vocab).sample(found, logits.clone())
