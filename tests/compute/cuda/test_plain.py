"""The plain attention kernel against torch: decodes and chunks, windows and caps, float32 and what else there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.compute.cuda.device import DEVICE, error, skip_without_gpu

skip_without_gpu()

from pd_serve.compute.cuda.attention import AttentionShape, PlainDecode, PlainPrefill  # noqa: E402
from tests.compute.cuda.pools import Pool, queries, shape  # noqa: E402

pytestmark = pytest.mark.gpu

SHAPES = [
    replace(shape(9, 3, 64, 16), dtype=torch.float32),
    replace(shape(4, 1, 40, 64, window=37), dtype=torch.float32),
    replace(shape(2, 2, 256, 16, cap=3.0), dtype=torch.float32),
    replace(shape(4, 2, 128, 16, window=16, cap=5.0), dtype=torch.float16),
    replace(shape(4, 2, 64, 16, fp8=True), dtype=torch.float32),
]


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_decode(s: AttentionShape) -> None:
    lens = [1, 16, 17, 150]
    pool, q = Pool(s, lens), queries(s, len(lens))
    out = torch.full_like(q, torch.nan)
    decode = PlainDecode(s, 8, pool.tables.shape[1] + 3, DEVICE)
    decode.prepare(pool.seen, torch.tensor(lens, dtype=torch.int32))
    decode.run(q, pool.k, pool.v, out, pool.scales)
    for row in range(len(lens)):
        assert error(out[row : row + 1], pool.expected(row, q[row : row + 1])) < (
            1e-5 if s.dtype is torch.float32 else 2e-3
        )


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_prefill(s: AttentionShape) -> None:
    new, prefix = [7, 1, 40], [0, 33, 16]
    pool = Pool(s, [n + p for n, p in zip(new, prefix, strict=True)])
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    wide = queries(replace(s, num_heads=s.num_heads + 1), starts[-1])
    q, out = wide[:, : s.num_heads], torch.full_like(wide, torch.nan)[:, : s.num_heads]  # rows apart
    prefill = PlainPrefill(s, DEVICE)
    prefill.prepare(torch.tensor(starts, dtype=torch.int32), torch.tensor(pool.lens, dtype=torch.int32), pool.tables)
    prefill.run(q, None, pool.k, pool.v, out, pool.scales)
    for row in range(len(new)):
        rows = slice(starts[row], starts[row + 1])
        assert error(out[rows], pool.expected(row, q[rows])) < (1e-5 if s.dtype is torch.float32 else 2e-3)
