"""Attention over the paged pool equals dense attention, whatever the blocks, windows, chunks and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.compute.cpu.attention.paged import PagedAttention
from pd_serve.compute.step import Step
from pd_serve.errors import ModelError
from pd_serve.jit import set_kernel_threads
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.models.interface import HeadTransform
from pd_serve.models.weights import KV_DTYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = 2


@dataclass
class Case:
    """``steps``: for each step, the new tokens of each sequence (0 = not in this step)."""

    steps: list[list[int]]
    kv_heads: int = 2
    share: int = 3
    dim: int = 64
    dtype: str = "float32"
    windows: tuple[int | None, ...] = (None,)
    block_size: int = 16
    parallel: bool = False
    kv_dtype: str = ""  # of the pool, where it is in FP8
    scales: tuple[float, float] = (1.0, 1.0)  # of K and V there


def check(case: Case, seed: int = 0) -> None:
    """Runs the steps on a pool full of NaN and compares each token's attention with dense float32 attention."""
    random = np.random.default_rng(seed)
    dtype, bs = DTYPES[case.dtype], case.block_size
    num_seqs = len(case.steps[0])
    totals = [sum(step[i] for step in case.steps) for i in range(num_seqs)]
    blocks = [-(-n // bs) for n in totals]
    groups = tuple(
        kv_group(tuple(range(g, LAYERS * len(case.windows), len(case.windows))), case.kv_heads, case.dim, window)
        for g, window in enumerate(case.windows)
    )
    layout = KVLayout(bs, case.kv_dtype or case.dtype, groups)
    num_blocks = sum(blocks) + 1
    regions = []
    for g in range(len(groups)):
        kept = KV_DTYPES[layout.dtype]
        pool = torch.full((num_blocks * layout.block_bytes(g) // kept.itemsize,), float("nan")).to(kept)
        regions.append(pool.view(torch.uint8))
    numbers = np.split(random.permutation(num_blocks - 1).astype(np.int32) + 1, np.cumsum(blocks)[:-1])
    heads = case.kv_heads * case.share
    scale = 0.7 * case.dim**-0.5
    attention = PagedAttention(layout, regions, heads, scale, dtype, parallel=case.parallel)

    torch.manual_seed(seed)
    layers = LAYERS * len(groups)
    turns = torch.zeros(max(totals), case.dim)
    turns[:, : case.dim // 2] = 1.0  # cosines
    unturned = HeadTransform(turns, k_scale=case.scales[0], v_scale=case.scales[1])
    # queries, keys and values of a token are one row, as the decoder makes them
    rows = [torch.randn(layers, n, heads + 2 * case.kv_heads, case.dim).to(dtype) for n in totals]
    kept_rows = [kept_of(row, heads, case) for row in rows]
    done = [0] * num_seqs
    for step in case.steps:
        order = [i for i in range(num_seqs) if step[i] == 1 and done[i]]
        num_decode = len(order)
        order += [i for i in range(num_seqs) if step[i] and i not in order]
        counts = [step[i] for i in order]
        lengths = np.array([done[i] + step[i] for i in order], np.int32)
        positions = np.concatenate([np.arange(done[i], done[i] + step[i]) for i in order])
        row = np.repeat(np.arange(len(order)), counts)
        tables, slots = [], []
        for group in groups:
            table = np.zeros((len(order), -(-int(lengths.max()) // bs)), np.int32)
            for j, i in enumerate(order):
                table[j, : min(blocks[i], table.shape[1])] = numbers[i][: table.shape[1]]
            slots.append(table[row, positions // bs].astype(np.int64) * bs + positions % bs)
            if group.window is not None:
                for j, i in enumerate(order):  # what no new token sees is gone
                    table[j, : max(0, done[i] - group.window + 1) // bs] = 0
            tables.append(table)
        attention.start(
            Step(
                tokens=np.zeros(len(positions), np.int64),
                positions=positions.astype(np.int64),
                query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
                seq_lens=lengths,
                slots=slots,
                block_tables=tables,
                logits_rows=np.zeros(0, np.int64),
                num_decode=num_decode,
            )
        )
        for g, group in enumerate(groups):
            for layer in group.layers:
                new = torch.cat([rows[i][layer, done[i] : done[i] + step[i]] for i in order])
                parts = new.split([heads, case.kv_heads, case.kv_heads], dim=1)
                found = attention(layer, *parts, torch.from_numpy(positions), unturned)
                expected = torch.cat(
                    [
                        dense(kept_rows[i][layer, : done[i] + step[i]], step[i], case, scale, case.windows[g])
                        for i in order
                    ]
                )
                tolerance = (4e-6 if case.kv_dtype else 2e-6) if case.dtype == "float32" else 0.02
                torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
        for i in order:
            done[i] += step[i]


def kept_of(rows: torch.Tensor, heads: int, case: Case) -> torch.Tensor:
    """What the pool keeps of them: queries as they are, K and V rounded where it is in FP8."""
    kept = rows.float()
    if case.kv_dtype:
        for part, scale in zip(kept[:, :, heads:].split(case.kv_heads, dim=2), case.scales, strict=True):
            part.copy_((part * (1.0 / scale)).to(torch.float8_e4m3fn).float() * scale)
    return kept


def dense(rows: torch.Tensor, new: int, case: Case, scale: float, window: int | None) -> torch.Tensor:
    """Attention of the last ``new`` of ``rows`` over all of them, in float64."""
    q, k, v = rows.double().split([case.kv_heads * case.share, case.kv_heads, case.kv_heads], dim=1)
    k, v = (x.repeat_interleave(case.share, dim=1) for x in (k, v))
    query, key = torch.arange(len(rows) - new, len(rows))[:, None], torch.arange(len(rows))[None]
    seen = (key <= query) & (key > query - (window or len(rows)))
    scores = torch.einsum("qhd,khd->hqk", q[len(rows) - new :], k) * scale
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return mixed.flatten(1).float()


# A kernel is compiled for each: of sixteen pairs, those that have every size twice.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "share"), [(24, 1), (24, 8), (64, 3), (64, 4), (128, 4), (128, 8), (256, 1), (256, 3)])
def test_shapes(dtype: str, dim: int, share: int) -> None:
    check(Case([[37, 5], [1, 1], [1, 12]], share=share, dim=dim, dtype=dtype, kv_heads=1 if dim == 256 else 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 130, 300])
def test_a_prompt_in_chunks(dtype: str, chunk: int) -> None:
    whole, rest = divmod(300, chunk)
    check(Case([[chunk]] * min(whole, 5) + [[rest]] * bool(rest) + [[1]], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sliding_windows_beside_full_attention(dtype: str) -> None:
    steps = [[150, 20, 3], [1, 40, 1], [33, 1, 1], [1, 1, 1]]
    check(Case(steps, windows=(24, None, 5), dtype=dtype, kv_heads=1, share=4, dim=32))


def test_decodes_and_several_prompts_in_one_step() -> None:
    check(Case([[0, 17, 64, 0, 0], [200, 1, 1, 1, 31], [1, 1, 1, 1, 140]], dim=64))


def test_many_threads_agree() -> None:
    set_kernel_threads(2)
    check(Case([[30, 100, 5, 64], [1, 1, 1, 1], [1, 1, 1, 1]], parallel=True))


@pytest.mark.parametrize(
    ("dtype", "dim", "share", "block"),
    [("bfloat16", 64, 4, 16), ("float32", 128, 1, 4), ("float32", 16, 2, 16), ("bfloat16", 12, 3, 16)],
)
def test_keys_and_values_in_fp8(dtype: str, dim: int, share: int, block: int) -> None:
    case = Case([[37, 5, 150], [1, 1, 33], [1, 12, 1]], share=share, dim=dim, dtype=dtype, block_size=block)
    case.kv_dtype, case.scales, case.windows = "float8_e4m3fn", (0.5, 0.03), (None, 24)
    check(case)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    chunk=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 50)),
    block_size=st.sampled_from([4, 16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_schedule(lengths: list[int], chunk: int, window: int | None, block_size: int, seed: int) -> None:
    steps = []
    left = list(lengths)
    while any(left):
        steps.append([min(n, chunk) for n in left])
        left = [max(0, n - chunk) for n in left]
    steps += [[1] * len(lengths)] * 2
    check(Case(steps, windows=(window,), block_size=block_size, kv_heads=1, share=2, dim=16), seed)


@pytest.mark.parametrize(("dim", "dtype"), [(2, "float32"), (4, "bfloat16"), (10, "bfloat16"), (12, "float32")])
def test_head_sizes_of_tiny_models(dtype: str, dim: int) -> None:
    check(Case([[37, 5], [1, 1], [1, 12]], share=2, dim=dim, dtype=dtype, windows=(None, 9)))


def test_a_block_size_that_cannot_be_computed_is_refused() -> None:
    layout = KVLayout(6, "float32", (kv_group((0,), 1, 64),))
    with pytest.raises(ModelError, match="multiple"):
        PagedAttention(layout, [torch.zeros(layout.block_bytes(0), dtype=torch.uint8)], 2, 1.0, torch.float32)
