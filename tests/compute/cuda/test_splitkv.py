"""The split-KV kernel for decodes against float32: odd lengths, windows, caps, FP8, and what nobody may read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.compute.cuda.device import DEVICE, INTERPRETED, error, skip_without_gpu

skip_without_gpu()

from benchmarks.splitkv import SplitKv  # noqa: E402
from pd_serve.compute.cuda.attention import AttentionShape  # noqa: E402
from tests.compute.cuda.pools import LAYER, LAYERS, Pool, queries, shape  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]  # the interpreter has no dot of bfloat16
SHAPES = [
    shape(32, 8, 128, 64), shape(9, 3, 64, 16), shape(8, 8, 128, 32), shape(4, 1, 256, 64), shape(32, 1, 128, 64),
    shape(2, 2, 80, 16), shape(8, 2, 128, 128), shape(8, 2, 128, 16, window=37), shape(4, 1, 128, 64, window=64),
    shape(4, 1, 64, 32, window=1), shape(8, 8, 128, 16, cap=3.0), shape(4, 1, 256, 16, window=37, cap=5.0),
    shape(32, 8, 128, 64, fp8=True), shape(8, 2, 64, 16, window=37, fp8=True), shape(4, 1, 256, 32, cap=2.0, fp8=True),
]  # fmt: skip
BATCHES = [[1], [64, 65, 63, 1, 128], [300, 16, 17, 15, 257, 2], [1000, 1, 1]]
ROWS = 8


class Poisoned(Pool):
    """NaN wherever a sequence sees nothing: in other blocks and layers, beyond its length, before its window."""

    def __init__(self, s: AttentionShape, lens: list[int], q: Tensor) -> None:
        super().__init__(s, [max(1, n) for n in lens])
        self.wanted = [
            self.expected(row, q[row : row + 1]) if n else q[row : row + 1] * 0 for row, n in enumerate(lens)
        ]
        seen = torch.zeros(len(self.data), s.block_size, dtype=torch.bool)
        for row, n in enumerate(lens):
            at = torch.arange(0 if s.window is None else max(0, n - s.window), n)
            seen[self.tables[row].long()[at // s.block_size], at % s.block_size] = True
        theirs = self.data.float()
        kept = torch.full_like(theirs, torch.nan)
        kept[:, LAYER].movedim(3, 1)[seen.to(DEVICE)] = theirs[:, LAYER].movedim(3, 1)[seen.to(DEVICE)]
        self.data.copy_(kept.to(self.data.dtype))

    def check(self, out: Tensor) -> None:
        for row, wanted in enumerate(self.wanted):
            assert error(out[row : row + 1], wanted) < 4e-3 if wanted.any() else not out[row].any()


def on_device(lens: list[int], rows: int = 0) -> Tensor:
    """Filled up with rows of nobody."""
    return torch.tensor(lens + [0] * (rows - len(lens)), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_against_float32(s: AttentionShape, dtype: torch.dtype) -> None:
    s = replace(s, dtype=dtype)
    kernel = SplitKv(s, ROWS, DEVICE)
    for lens in BATCHES:
        q = queries(s, len(lens))
        pool, out = Poisoned(s, lens, q), torch.empty_like(q)
        kernel.plan(on_device(lens))
        for _ in range(2):  # the second finds what the first left behind
            out.fill_(torch.nan)
            kernel.attend(q, pool.k, pool.v, out, pool.seen.to(DEVICE), on_device(lens), pool.scales)
            pool.check(out)
            assert not kernel.arrived.any()


@pytest.mark.parametrize("programs", [1, 2, 7, 100])
@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[7], SHAPES[12]], ids=str)
def test_any_number_of_programs(s: AttentionShape, programs: int) -> None:
    s = replace(s, dtype=DTYPES[0])
    lens = [300, 0, 64, 1, 0, 0, 129, 65]
    q = queries(s, len(lens))
    pool, out = Poisoned(s, lens, q), torch.full_like(q, torch.nan)
    kernel = SplitKv(s, ROWS, DEVICE, programs=programs)
    kernel.plan(on_device(lens))
    kernel.attend(q, pool.k, pool.v, out, pool.seen.to(DEVICE), on_device(lens), pool.scales)
    pool.check(out)


@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[8], SHAPES[12]], ids=str)
def test_rows_of_nobody_change_no_bit(s: AttentionShape) -> None:
    s = replace(s, dtype=DTYPES[0])
    lens = [700, 3, 130, 64, 65]
    q = queries(s, ROWS)
    pool, kernel = Poisoned(s, lens + [0] * (ROWS - len(lens)), q), SplitKv(s, ROWS, DEVICE, programs=11)
    outs = []
    for rows in (len(lens), ROWS):
        out = torch.full_like(q, torch.nan)
        kernel.plan(on_device(lens, rows))
        kernel.attend(q[:rows], pool.k, pool.v, out[:rows], pool.seen.to(DEVICE), on_device(lens, rows), pool.scales)
        outs.append(out)
    assert torch.equal(outs[0][: len(lens)], outs[1][: len(lens)])
    pool.check(outs[1])


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[1], SHAPES[7], SHAPES[10], SHAPES[12]], ids=str)
def test_a_graph_has_the_bits_of_an_eager_step(s: AttentionShape) -> None:
    pool, q = Pool(s, [1100] * ROWS), queries(s, ROWS)  # one pool, as its addresses are in the graph
    kernel = SplitKv(s, ROWS, DEVICE)
    tables, lens = pool.tables.to(DEVICE), on_device([1] * ROWS)
    out, eager = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)

    def step(rows: int, out: Tensor) -> None:
        kernel.plan(lens[:rows])
        for layer in range(LAYERS):
            k, v = pool.data[:, layer, 0], pool.data[:, layer, 1]
            kernel.attend(q[:rows], k, v, out[:rows], tables[:rows], lens[:rows], pool.scales)

    step(ROWS, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ROWS, out)
    for own in ([1, 64, 65, 700], [1100] * ROWS, [5], [33, 1024, 17, 900, 2, 640]):
        q.copy_(queries(s, ROWS))
        lens.copy_(on_device(own, ROWS))
        graph.replay()
        step(len(own), eager)
        assert torch.equal(out[: len(own)], eager[: len(own)])
