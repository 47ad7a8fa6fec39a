"""Decode attention by a kernel of our own (``splitkv.py`` beside this) and by XQA, on one GPU.

    python -m benchmarks.gpu_decode_attention [--kv bfloat16 float8_e4m3fn] [--block 64] [--cases 32x1024 mixed64 ...]

The heads of Llama-3.1-8B: 32 of queries, 8 of K and V, of 128. A figure is a layer's part of a CUDA graph of 32 layers
over a pool of 39 GiB, so that nothing is in the L2 cache, with random K and V in scattered blocks: the median of five
replays. ``mixed`` cases have rows of many lengths. *share* is the bytes of K and V over the time, as a share of the
rate at which the same run reads memory; *error* the largest of some rows against float32, relative. A way is ``WRONG``
whose error is 0.01 or more (XQA's over FP8 is about 0.05), that gives other bits the second time, or that leaves a
counter behind. Prints lines that begin with RESULT, the fastest way first; begins no case after ``--seconds``.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from benchmarks.gpu_kernels import DEVICE, DIM, KV_HEADS, Q_HEADS, read_rate, result
from benchmarks.splitkv import KvTile, SplitKv
from pd_serve.compute.cuda.attention import UNSCALED, AttentionShape, Scales, Workspaces, XqaDecode, compile_kernels
from pd_serve.compute.cuda.timing import graph_us

LAYERS, TOKENS, MAX_ROWS, MAX_LEN = 32, 320_000, 256, 10_240
CHECKED = 3  # the layer whose result is compared
KV_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
FP8_SCALES = Scales(0.25, 0.5)
TILES = (
    KvTile(64, 3, 4, 1), KvTile(64, 3, 4, 2), KvTile(64, 3, 4, 3), KvTile(64, 3, 4, 4), KvTile(64, 3, 4, 8),
    KvTile(64, 3, 4, 2, 2), KvTile(64, 4, 4, 2), KvTile(32, 4, 4, 3), KvTile(32, 4, 4, 4), KvTile(32, 4, 2, 2),
    KvTile(32, 4, 2, 4), KvTile(32, 5, 4, 3),
)  # fmt: skip
FP8_TILES = (
    KvTile(64, 4, 4, 1), KvTile(64, 4, 4, 2), KvTile(64, 4, 4, 3), KvTile(64, 6, 4, 2), KvTile(32, 6, 4, 4),
    KvTile(32, 6, 2, 4), KvTile(64, 4, 8, 2), KvTile(128, 3, 4, 2),
)  # fmt: skip


def cases() -> dict[str, list[int]]:
    """Lengths of rows, by name; those that matter most first."""
    draw = torch.Generator().manual_seed(1)
    wide = (128 * 2 ** (6 * torch.rand(32, generator=draw))).int().tolist()  # 128 to 8,192, each doubling as likely
    some, many = (torch.randint(100, 2000, (rows,), generator=draw).tolist() for rows in (64, 256))
    alike = {f"{rows}x{length}": [length] * rows for rows, length in (
        (32, 1024), (1, 8192), (8, 1024), (1, 1024), (256, 1024), (64, 1024), (128, 1024), (24, 1040), (30, 1024),
        (4, 1024), (32, 8192),
    )}  # fmt: skip
    return {**alike, "mixed32": wide, "mixed64": some, "mixed256": many}


class Pool:
    """Random K and V; as many blocks whatever is read of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._numbers = torch.empty((LAYERS * 2 * KV_HEADS * DIM * TOKENS,), dtype=dtype, device=DEVICE)
        for part in self._numbers.split(1 << 30):
            part.copy_(torch.randn(len(part), device=DEVICE, dtype=torch.bfloat16).mul_(1 if dtype.itemsize > 1 else 4))

    def layers(self, block: int) -> list[tuple[Tensor, Tensor]]:
        """K and V of each, in blocks of so many tokens."""
        whole = self._numbers.view(-1, LAYERS, 2, KV_HEADS, block, DIM)
        return [(whole[:, layer, 0], whole[:, layer, 1]) for layer in range(LAYERS)]


@dataclass
class Case:
    """A step's rows, and what some of them must give in the layer that is checked."""

    lens: Tensor
    tables: Tensor
    q: Tensor
    wanted: dict[int, Tensor]

    @classmethod
    def of(cls, lens: list[int], s: AttentionShape, k: Tensor, v: Tensor, scales: Scales) -> Case:
        tables = torch.zeros((len(lens), MAX_LEN // s.block_size + 1), dtype=torch.int32)
        blocks = (torch.randperm(len(k) - 1) + 1).int()
        for row, n in enumerate(lens):
            count = -(-n // s.block_size)
            tables[row, :count], blocks = blocks[:count], blocks[count:]
        q = torch.randn(len(lens), Q_HEADS, DIM, device=DEVICE).mul_(2).to(s.dtype)
        rows = {0, len(lens) - 1, lens.index(max(lens)), lens.index(min(lens))}
        wanted = {row: expected(s, q[row], k, v, tables[row], lens[row], scales) for row in rows}
        return cls(torch.tensor(lens, dtype=torch.int32), tables, q, wanted)

    def error(self, out: Tensor) -> float:
        return max(((out[row] - it).norm() / it.norm()).item() for row, it in self.wanted.items())


def expected(s: AttentionShape, q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: int, scales: Scales) -> Tensor:
    """By torch in float32, of one row."""
    blocks = table[: -(-n // s.block_size)].long().to(DEVICE)
    keys, values = (
        (cache[blocks].float() * scale).transpose(1, 2).flatten(0, 1)[:n].repeat_interleave(Q_HEADS // KV_HEADS, 1)
        for cache, scale in zip((k, v), scales, strict=True)
    )
    return torch.einsum("hn,nhd->hd", (torch.einsum("hd,nhd->hn", q.float(), keys) * s.scale).softmax(-1), values)


class Bench:
    """Of one shape over one pool."""

    def __init__(self, s: AttentionShape, pool: Pool, rate: float, workspaces: Workspaces) -> None:
        self.shape, self.rate, self.workspaces = s, rate, workspaces
        self.layers = pool.layers(s.block_size)
        self.scales = FP8_SCALES if s.fp8_kv else UNSCALED
        self.name = f"{'fp8' if s.fp8_kv else 'bf16'} blocks of {s.block_size}"
        self.own = {tile: SplitKv(s, MAX_ROWS, DEVICE, tile=tile) for tile in (FP8_TILES if s.fp8_kv else TILES)}
        begin = time.perf_counter()
        self._compile()
        result(f"{self.name}: {len(self.own)} tiles compiled s={time.perf_counter() - begin:.1f}")

    def _compile(self) -> None:
        q = torch.empty((2, Q_HEADS, DIM), dtype=self.shape.dtype, device=DEVICE)
        tables = torch.zeros((2, MAX_LEN // self.shape.block_size + 1), dtype=torch.int32, device=DEVICE)
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for kernel in self.own.values():
                lens = tables[:, 0].contiguous()
                kernel.attend(q, *self.layers[0], q, tables, lens, self.scales, compile_only=True)

    def case(self, name: str, lens: list[int]) -> None:
        case = Case.of(lens, self.shape, *self.layers[CHECKED], self.scales)
        xqa = XqaDecode(self.shape, len(lens), case.tables.shape[1], DEVICE, self.workspaces)
        xqa.prepare(case.tables, case.lens)
        out = torch.full_like(case.q, torch.nan)

        def run_xqa(k: Tensor, v: Tensor) -> None:
            xqa.run(case.q, k, v, out, self.scales)

        run_xqa(*self.layers[CHECKED])
        error = case.error(out)
        us, behind = self._us(run_xqa), self._us_behind(run_xqa)
        self._say(name, "XQA", case, us, error, f"behind a multiplication us={behind:.1f}")
        self._ours(name, case)

    def _ours(self, name: str, case: Case) -> None:
        tables, lens, out = case.tables.to(DEVICE), case.lens.to(DEVICE), torch.empty_like(case.q)
        found: list[tuple[float, float, KvTile]] = []

        def run(kernel: SplitKv, k: Tensor, v: Tensor) -> None:
            kernel.attend(case.q, k, v, out, tables, lens, self.scales)

        for tile, kernel in self.own.items():
            out.fill_(torch.nan)
            kernel.plan(lens)
            try:
                run(kernel, *self.layers[CHECKED])
            except triton.runtime.errors.OutOfResources as error:
                result(self.name, name, tile, error)
                continue
            first, error = out.clone(), case.error(out)
            us = self._us(partial(run, kernel))
            run(kernel, *self.layers[CHECKED])
            if not (error < 0.01 and torch.equal(out, first) and not kernel.arrived.any()):
                result(self.name, name, "WRONG", tile, f"error={error:.4f} again={torch.equal(out, first)}")
            found.append((us, error, tile))
        for us, error, tile in sorted(found, key=lambda way: way[0]):
            self._say(name, "own", case, us, error, str(tile))
        best = self.own[min(found, key=lambda way: way[0])[2]]
        plan_us = graph_us(lambda: [best.plan(lens) for _ in range(LAYERS)], 5) / LAYERS
        behind = self._us_behind(partial(run, best))
        result(self.name, name, f"own, the fastest: behind a multiplication us={behind:.1f}, plan us={plan_us:.2f}")

    def _us(self, run: Callable[[Tensor, Tensor], None]) -> float:
        return graph_us(lambda: [run(k, v) for k, v in self.layers], 5) / LAYERS

    def _us_behind(self, run: Callable[[Tensor, Tensor], None]) -> float:
        """With a multiplication before each layer that leaves its 117 MB in the L2 cache, without its time."""
        x = torch.randn(32, 4096, device=DEVICE, dtype=torch.bfloat16)
        weights = [torch.randn(4096, 14336, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        y = x.new_empty((32, 14336))

        def chain(*, attend: bool) -> None:
            for i, (k, v) in enumerate(self.layers):
                torch.mm(x, weights[i % 3], out=y)
                if attend:
                    run(k, v)

        both, alone = (graph_us(partial(chain, attend=attend), 5) for attend in (True, False))
        return (both - alone) / LAYERS

    def _say(self, name: str, way: str, case: Case, us: float, error: float, more: str) -> None:
        size = 2 * int(case.lens.sum()) * KV_HEADS * DIM * self.shape.kv_dtype.itemsize
        result(f"{self.name} {name} {way} us={us:.1f} share={size / us / self.rate:.2f} error={error:.4f} {more}")


def rows_of_nobody(s: AttentionShape, pool: Pool, workspaces: Workspaces) -> None:
    """What XQA makes of rows without a token, as ours takes those that fill up a graph."""
    k, v = pool.layers(s.block_size)[CHECKED]
    case = Case.of([1024, 64, 300, 1], s, k, v, UNSCALED)
    case.lens[1] = case.lens[3] = 0
    xqa = XqaDecode(s, 4, case.tables.shape[1], DEVICE, workspaces)
    xqa.prepare(case.tables, case.lens)
    out = torch.full_like(case.q, torch.nan)
    xqa.run(case.q, k, v, out)
    theirs = expected(s, case.q[2], k, v, case.tables[2], 300, UNSCALED)
    error = ((out[2] - theirs).norm() / theirs.norm()).item()
    largest = [out[row].float().abs().max().item() for row in (1, 3)]
    result(f"XQA with rows of 0 tokens: largest there {largest}, error of a row beside them {error:.4f}")


def shapes(kv: Sequence[str], blocks: Iterable[int]) -> list[AttentionShape]:
    return [
        AttentionShape(Q_HEADS, KV_HEADS, DIM, block, DIM**-0.5, fp8_kv=KV_DTYPES[name].itemsize == 1)
        for name in kv
        for block in blocks
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), help="of the pool")
    parser.add_argument("--block", nargs="+", type=int, default=[64], help="tokens of a block")
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()))
    parser.add_argument("--seconds", type=float, default=100)
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    rate = read_rate()
    result(f"peak {torch.cuda.get_device_name()} read={rate / 1e3:.0f} GB/s")
    workspaces = Workspaces(DEVICE)
    for name in options.kv:
        own_shapes = shapes([name], options.block)
        later = [s for s in shapes(options.kv, options.block) if s not in own_shapes]
        compile_kernels(own_shapes, DEVICE, print)
        others = threading.Thread(target=compile_kernels, args=(later, DEVICE), daemon=True)  # while these are timed
        others.start()
        pool = Pool(KV_DTYPES[name])
        for s in own_shapes:
            bench = Bench(s, pool, rate, workspaces)
            for case in options.cases:
                if time.perf_counter() - begin < options.seconds:
                    bench.case(case, cases()[case])
        del pool, bench
        others.join()
    if "bfloat16" in options.kv:  # last, as nobody has promised that it ends well
        rows_of_nobody(shapes(["bfloat16"], options.block)[0], Pool(torch.bfloat16), workspaces)
    result(f"done s={time.perf_counter() - begin:.0f}")


if __name__ == "__main__":
    main()
