"""K and V out of an FP8 pool: every sequence's tokens in their order, whatever blocks they lie in."""

from __future__ import annotations

import pytest
import torch

from tests.compute.cuda.device import DEVICE, skip_without_gpu

skip_without_gpu()

from pd_serve.compute.cuda.attention import AttentionShape  # noqa: E402
from pd_serve.compute.cuda.unpack import pages_of, unpack  # noqa: E402
from tests.compute.cuda.pools import Pool, shape  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("s", [shape(8, 2, 64, 16, fp8=True), shape(4, 1, 96, 64, fp8=True)], ids=str)
def test_unpack(s: AttentionShape) -> None:
    pool = Pool(s, [1, 16, 17, 150])
    lens = torch.tensor(pool.lens, dtype=torch.int32)
    counts = -(-lens // s.block_size)
    starts = torch.tensor([0, *counts.cumsum(0).tolist()], dtype=torch.int32)
    indices = torch.cat([table[:count] for table, count in zip(pool.tables, counts.tolist(), strict=True)])
    first, pages = pages_of(lens, starts, indices, s.block_size)
    assert first.tolist() == [0, 1, 17, 34, 184] and pages.dtype is torch.int32
    k, v = torch.full((2, 184, s.num_kv_heads, s.head_dim), torch.nan, device=DEVICE)
    unpack(pool.k, pool.v, pages.to(DEVICE), k, v, pool.scales)
    for row in range(len(lens)):
        its_k, its_v = pool.of(row)
        assert torch.equal(k[first[row] : first[row + 1]], its_k)
        assert torch.equal(v[first[row] : first[row + 1]], its_v)
