"""Attention over a block-major pool against torch in float32: heads, blocks, windows, caps, K and V in FP8, graphs."""

from __future__ import annotations

import pytest
import torch

from tests.compute.cuda.device import DEVICE, INTERPRETED, error, skip_without_gpu

if INTERPRETED:
    pytest.skip("FlashInfer needs a GPU", allow_module_level=True)
skip_without_gpu()
pytest.importorskip("flashinfer")

from pd_serve.compute.cuda.attention import (  # noqa: E402
    AttentionShape,
    Decode,
    FlashPrefill,
    PlannedDecode,
    Workspaces,
    XqaDecode,
    compile_kernels,
    make_decode,
)
from tests.compute.cuda.pools import Pool, queries, shape  # noqa: E402

pytestmark = pytest.mark.gpu

XQA = [
    shape(32, 8, 128, 16), shape(32, 8, 128, 64), shape(9, 3, 64, 16), shape(8, 8, 128, 16), shape(16, 2, 64, 64),
    shape(8, 2, 128, 16, window=37), shape(8, 2, 256, 16),
    shape(32, 8, 128, 64, fp8=True), shape(8, 2, 128, 16, window=37, fp8=True), shape(8, 2, 64, 16, fp8=True),
]  # fmt: skip
PLANNED = [
    shape(32, 8, 128, 16), shape(9, 3, 64, 64), shape(8, 8, 128, 16, cap=3.0), shape(4, 1, 256, 16, window=37, cap=5.0),
    shape(32, 8, 128, 64, fp8=True),
]  # fmt: skip
SHAPES = [*XQA, *PLANNED]


@pytest.fixture(scope="module")
def workspaces() -> Workspaces:
    return Workspaces(DEVICE)


def most(decode: Decode, s: AttentionShape) -> float:
    """The error that is accepted: XQA over K and V in FP8 rounds queries and weights to FP8 (seen: up to 0.081)."""
    return 0.12 if s.fp8_kv and isinstance(decode, XqaDecode) else 1e-2


def check_decode(decode: Decode, s: AttentionShape) -> None:
    for lens in ([1, 16, 17, 300, 1025], [64], [40, 5, 700]):
        pool, q = Pool(s, lens), queries(s, len(lens))
        out = torch.full_like(q, torch.nan)
        decode.prepare(pool.seen, torch.tensor(lens, dtype=torch.int32))
        decode.run(q, pool.k, pool.v, out, pool.scales)
        for row in range(len(lens)):
            assert error(out[row : row + 1], pool.expected(row, q[row : row + 1])) < most(decode, s)


def check_graphs(decode: Decode, s: AttentionShape) -> None:
    sizes = (8, 4)
    longest = Pool(s, [1100] * 8)  # one pool for all steps, as its addresses are in the graphs
    q = queries(s, 8)
    out = torch.full_like(q, torch.nan)
    graphs = {}
    decode.begin_capture(sizes)
    for size in sizes:
        decode.capture(size)
        decode.run(q[:size], longest.k, longest.v, out[:size], longest.scales)
        torch.cuda.synchronize()
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size]):
            decode.run(q[:size], longest.k, longest.v, out[:size], longest.scales)
    for size, lens in ((8, [5, 1100, 3, 77, 500, 16]), (4, [1, 2]), (4, [900, 17, 33, 1024]), (8, [1000] * 8)):
        longest.lens = lens
        q.copy_(queries(s, 8))
        tables = longest.tables[: len(lens)].clone()
        if s.window is not None:
            for row, n in enumerate(lens):
                tables[row, : max(0, n - s.window) // s.block_size] = 0
        out.fill_(torch.nan)
        decode.replay(size, tables, torch.tensor(lens, dtype=torch.int32))
        graphs[size].replay()
        for row in range(len(lens)):
            assert error(out[row : row + 1], longest.expected(row, q[row : row + 1])) < most(decode, s)


@pytest.mark.timeout(300)  # kernels may have to be compiled
@pytest.mark.parametrize("s", XQA, ids=str)
def test_xqa(s: AttentionShape, workspaces: Workspaces) -> None:
    decode = make_decode(s, 8, -(-1100 // s.block_size), DEVICE, workspaces)
    assert isinstance(decode, XqaDecode)
    check_decode(decode, s)
    check_graphs(decode, s)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("s", PLANNED, ids=str)
def test_planned(s: AttentionShape, workspaces: Workspaces) -> None:
    if s.soft_cap is not None:
        assert isinstance(make_decode(s, 8, 4, DEVICE, workspaces), PlannedDecode)
    decode = PlannedDecode(s, 8, -(-1100 // s.block_size), DEVICE, workspaces)
    check_decode(decode, s)
    check_graphs(decode, s)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("new", [[7, 1, 130], [200], [5, 64, 1, 33]])
@pytest.mark.parametrize("prefix", [[0, 0, 0, 0], [16, 100, 299, 0], [64, 64, 64, 64]])
@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[6], XQA[-1], *PLANNED[2:]], ids=str)
def test_prefill(s: AttentionShape, prefix: list[int], new: list[int], workspaces: Workspaces) -> None:
    lens = [n + p for n, p in zip(new, prefix, strict=False)]
    pool = Pool(s, lens)
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    heads = queries(AttentionShape(s.num_heads + 2 * s.num_kv_heads, 1, s.head_dim, 1, 1), starts[-1])
    q, k, v = heads.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), 1)
    for row, n in enumerate(new):
        own_k, own_v = pool.of(row)
        k[starts[row] : starts[row + 1]] = own_k[-n:]
        v[starts[row] : starts[row + 1]] = own_v[-n:]
    out = torch.full((starts[-1], s.num_heads, s.head_dim), torch.nan, device=DEVICE, dtype=s.dtype)
    prefill = FlashPrefill(s, DEVICE, workspaces)
    table = pool.tables if s.window is not None else pool.seen  # of a window, chunks see more than their last token
    prefill.prepare(torch.tensor(starts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), table)
    prefill.run(q, (k, v), pool.k, pool.v, out, pool.scales)
    from_pool = torch.full_like(out, torch.nan)
    prefill.prepare(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), table, pool_only=True
    )
    prefill.run(q, None, pool.k, pool.v, from_pool, pool.scales)
    as_read = from_pool.clone()
    if s.fp8_kv:  # as where there is no room to unpack
        prefill._unpacked = prefill._unpacked[:0]
        prefill.prepare(
            torch.tensor(starts, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), table, pool_only=True
        )
        prefill.run(q, None, pool.k, pool.v, as_read.fill_(torch.nan), pool.scales)
    for row in range(len(new)):
        rows = slice(starts[row], starts[row + 1])
        assert error(out[rows], pool.expected(row, q[rows])) < 1e-2
        assert error(from_pool[rows], pool.expected(row, q[rows])) < 1e-2
        assert error(as_read[rows], pool.expected(row, q[rows])) < 1e-2


@pytest.mark.timeout(300)
def test_compiling_is_announced_once() -> None:
    compile_kernels(SHAPES, DEVICE)
    said: list[str] = []
    compile_kernels(SHAPES, DEVICE, said.append)
    assert not said
