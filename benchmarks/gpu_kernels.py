"""The building blocks of the GPU engine, one by one, each replayed from a CUDA graph.

    python benchmarks/gpu_kernels.py [peak linears experts kernels sampler attention]

Shapes are those of an 8B Llama in bfloat16: hidden 4096, 32 query and 8 KV heads of 128, intermediate 14336, vocabulary
128,256; experts are those of a layer of Qwen3-30B-A3B: 128 of 768 x 2048, 8 a token. Weights and the KV of a large
batch do not fit into L2. Prints lines that begin with RESULT. ``share`` is the bytes that have to be read or written,
over the time, as a share of the rate at which the GPU reads memory in this run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from pd_serve.compute.cuda import experts, kernels, linears, matrix
from pd_serve.compute.cuda.sampler import Sampler, logprobs
from pd_serve.compute.cuda.timing import graph_us
from pd_serve.models.interface import Routing

DEVICE = torch.device("cuda")
HIDDEN, Q_HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB = 4096, 32, 8, 128, 14336, 128_256
SHAPES = {
    "qkv": ((Q_HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "lm_head": (VOCAB, HIDDEN),
}


def result(*words: object) -> None:
    print("RESULT", *words, flush=True)


@triton.jit
def _read(data: tl.tensor, out: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        total += tl.load(data + i + tl.arange(0, BLOCK), eviction_policy="evict_first")
    if tl.sum(total) == 123456789:
        tl.store(out, 1)


def read_rate() -> float:
    """Bytes a microsecond, the best of several ways to read 2 GiB."""
    words = 1 << 29
    data = torch.empty(words, dtype=torch.int32, device=DEVICE).random_()
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    best = 0.0
    for block, programs, warps in ((1024, 8, 4), (2048, 8, 4), (2048, 16, 8), (4096, 8, 8), (4096, 16, 8)):

        def read(block: int = block, programs: int = programs, warps: int = warps) -> None:
            _read[(sms * programs,)](data, out, words, BLOCK=block, num_warps=warps)

        best = max(best, 4 * words / graph_us(read, 5))
    return best


def bench_linears(rate: float) -> None:
    forms = {"": matrix.PLAIN, " fp8 rows": matrix.ROWS, " fp8 blocks": matrix.BLOCKS}
    shapes = {
        (form, name): linears.Shape(*size, code)
        for form, code in forms.items()
        for name, size in SHAPES.items()
        if not form or name != "lm_head"  # which checkpoints leave as it is
    }
    with tempfile.TemporaryDirectory() as folder:
        for attempt in ("first", "cached"):
            begin = time.perf_counter()
            chosen = linears.choose(shapes.values(), torch.bfloat16, DEVICE, cache=Path(folder))
            result(f"linears choose {attempt} s={time.perf_counter() - begin:.1f}")
    for (scales, name), shape in shapes.items():
        for t in chosen[shape]:
            size = (1 if scales else 2) * shape.outputs * shape.inputs
            share, torchs = (size / us / rate for us in (t.us, t.library_us))
            result(
                f"linear {name}{scales} rows={t.rows} us={t.us:.1f} share={share:.2f} torch={torchs:.2f} way={t.way}"
            )


def bench_experts(rate: float) -> None:
    """Beside torch's grouped multiplication (CUTLASS), which is given rows that are sorted already."""
    count, per_token, hidden, intermediate, number = 128, 8, 2048, 768, 4
    layers = [
        experts.Experts(
            torch.randn(count, 2 * intermediate, hidden, device=DEVICE, dtype=torch.bfloat16).mul_(hidden**-0.5),
            torch.randn(count, hidden, intermediate, device=DEVICE, dtype=torch.bfloat16).mul_(intermediate**-0.5),
            Routing(per_token, True),
            "silu",
        )
        for _ in range(number)
    ]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        experts.choose(layers, torch.bfloat16, cache=Path(folder))
        result(f"experts choose s={time.perf_counter() - begin:.1f}")
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192):
        x = torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16)
        logits = torch.randn(number, rows, count, device=DEVICE, dtype=torch.bfloat16)
        us = graph_us(lambda: [layer(x, logits[i]) for i, layer in enumerate(layers)]) / number  # noqa: B023
        ends = [layer.route(logits[i]).counts for i, layer in enumerate(layers)]
        routing_us = graph_us(lambda: [layer.route(logits[i]) for i, layer in enumerate(layers)]) / number  # noqa: B023
        used = sum(int((n > 0).sum()) for n in ends) / number
        ordered = x.repeat_interleave(per_token, 0)

        def torchs() -> None:
            for i, layer in enumerate(layers):
                offsets = ends[i].cumsum(0, dtype=torch.int32)  # noqa: B023
                made = torch._grouped_mm(ordered, layer.gate_up.transpose(1, 2), offs=offsets)  # noqa: B023
                torch._grouped_mm(kernels.silu_mul(made), layer.down.transpose(1, 2), offs=offsets)

        theirs = graph_us(torchs) / number
        read = used * 3 * hidden * intermediate * 2
        flop = rows * per_token * 3 * hidden * intermediate * 2
        tiles = [t[min(rows, len(t) - 1)] for t in (layers[0]._gate_up_tiles, layers[0]._down_tiles)]
        result(
            f"experts rows={rows} used={used:.0f} us={us:.1f} share={read / us / rate:.2f} "
            f"TFLOP/s={flop / us / 1e6:.0f} routing={routing_us:.1f} torch={theirs:.1f} tiles={tiles}"
        )


def bench_kernels(rate: float) -> None:
    for rows in (1, 32, 256, 8192):
        layers = max(2, -(-(1 << 28) // (rows * 2 * INTERMEDIATE * 2))) if rows > 256 else 16
        norm, cos_sin = torch.randn(HIDDEN, device=DEVICE), torch.randn(8192, DIM, device=DEVICE)
        x, residual = (torch.randn(layers, rows, HIDDEN, device=DEVICE).bfloat16() for _ in range(2))
        heads = torch.randn(layers, rows, Q_HEADS + 2 * KV_HEADS, DIM, device=DEVICE).bfloat16()
        gate_up = torch.randn(layers, rows, 2 * INTERMEDIATE, device=DEVICE).bfloat16()
        act = gate_up.new_empty(rows, INTERMEDIATE)
        normed = x.new_empty(rows, HIDDEN)
        pool = torch.zeros(rows // 16 + 1, layers, 2, KV_HEADS, 16, DIM, device=DEVICE, dtype=torch.bfloat16)
        slots = torch.randperm(pool.shape[0] * 16, device=DEVICE)[:rows]
        positions = torch.randint(8192, (rows,), device=DEVICE)
        head_norm = torch.randn(DIM, device=DEVICE)

        def rotate(layer: int, norm: torch.Tensor | None = None) -> None:
            q, k, v = heads[layer].split((Q_HEADS, KV_HEADS, KV_HEADS), 1)  # noqa: B023
            kernels.rotate_and_store(
                q, k, v, positions, cos_sin, slots, pool[:, layer, 0], pool[:, layer, 1],  # noqa: B023
                q_norm=norm, k_norm=norm, eps=1e-6,
            )  # fmt: skip

        work: dict[str, tuple[int, Callable[[int], object]]] = {
            "rms_norm": (2 * HIDDEN, lambda i: kernels.rms_norm(x[i], norm, 1e-6, normed)),  # noqa: B023
            "add_rms_norm": (4 * HIDDEN, lambda i: kernels.add_rms_norm(x[i], residual[i], norm, 1e-6)),  # noqa: B023
            "rotate_and_store": ((2 * Q_HEADS + 5 * KV_HEADS) * DIM, rotate),
            "norm_rotate_and_store": ((2 * Q_HEADS + 5 * KV_HEADS) * DIM, lambda i: rotate(i, head_norm)),  # noqa: B023
            "silu_mul": (3 * INTERMEDIATE, lambda i: kernels.silu_mul(gate_up[i], act)),  # noqa: B023
        }
        for name, (elements, call) in work.items():
            us = graph_us(lambda: [call(i) for i in range(layers)]) / layers  # noqa: B023
            result(f"kernel {name} rows={rows} us={us:.2f} share={2 * elements * rows / us / rate:.2f}")


def bench_sampler(rate: float) -> None:
    from pd_serve.compute.cuda.delivery import copy_now
    from pd_serve.compute.cuda.sampler import Rows
    from pd_serve.compute.step import SAMPLING

    kinds = {
        "greedy": {"temperature": 0.0},
        "plain": {},
        "top_p": {"top_p": 0.95},
        "top_k+top_p": {"top_k": 50, "top_p": 0.9},
    }
    for rows in (1, 32, 256):
        for spread in (1.0, 4.0):
            logits = torch.randn(rows, VOCAB, device=DEVICE).mul_(spread)
            sampler = Sampler(VOCAB, rows, DEVICE)
            for kind, values in kinds.items():
                host, sampling = Rows(rows, torch.device("cpu")), np.zeros(rows, SAMPLING)
                for name, value in {
                    "seed": np.arange(rows), "temperature": 1, "top_p": 1, "repetition_penalty": 1, "history": -1,
                    "bias": -1, **values,
                }.items():  # fmt: skip
                    sampling[name] = value
                host.fill(sampling, rows)
                sampler.rows.take(host, copy_now)
                us = graph_us(lambda: sampler.sample(logits))  # noqa: B023
                share = 2 * 4 * rows * VOCAB / us / rate
                result(f"sampler {kind} rows={rows} spread={spread:g} us={us:.1f} share={share:.2f}")
        tokens = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        us = graph_us(lambda: logprobs(logits, tokens, 20))  # noqa: B023
        result(f"logprobs top=20 rows={rows} us={us:.1f}")


def bench_attention(rate: float) -> None:
    from pd_serve.compute.cuda.attention import (
        AttentionShape,
        Decode,
        FlashPrefill,
        PlannedDecode,
        Workspaces,
        XqaDecode,
        compile_kernels,
    )

    layers, block = 8, 16
    shape = AttentionShape(Q_HEADS, KV_HEADS, DIM, block, DIM**-0.5)
    compile_kernels([shape], DEVICE, print)
    workspaces = Workspaces(DEVICE)
    for batch, context in ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (32, 8192), (128, 1024), (256, 1024)):
        blocks = context // block
        pool = torch.randn(batch * blocks + 1, layers, 2, KV_HEADS, block, DIM, device=DEVICE, dtype=torch.bfloat16)
        tables = (torch.randperm(batch * blocks) + 1).int().view(batch, blocks)
        lens = torch.full((batch,), context, dtype=torch.int32)
        q = torch.randn(batch, Q_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        out = torch.empty_like(q)
        for kind in (XqaDecode, PlannedDecode):
            decode: Decode = kind(shape, batch, blocks, DEVICE, workspaces)
            decode.begin_capture([batch])
            decode.capture(batch)
            decode.replay(batch, tables, lens)

            def run(decode: Decode = decode) -> None:
                for i in range(layers):
                    decode.run(q, pool[:, i, 0], pool[:, i, 1], out)  # noqa: B023

            us = graph_us(run) / layers
            share = 4 * batch * context * KV_HEADS * DIM / us / rate
            result(f"decode {kind.__name__} batch={batch} context={context} us={us:.1f} share={share:.2f}")
        del pool
    prefill = FlashPrefill(shape, DEVICE, workspaces)
    for new, prefix in ((512, 0), (2048, 0), (8192, 0), (2048, 6144), (512, 7680), (2048, 2048)):
        blocks = (new + prefix) // block
        pool = torch.randn(blocks + 1, layers, 2, KV_HEADS, block, DIM, device=DEVICE, dtype=torch.bfloat16)
        heads = torch.randn(new, Q_HEADS + 2 * KV_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        q, k, v = heads.split((Q_HEADS, KV_HEADS, KV_HEADS), 1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        tables = (torch.randperm(blocks) + 1).int()[None]
        prefill.prepare(
            torch.tensor([0, new], dtype=torch.int32), torch.tensor([new + prefix], dtype=torch.int32), tables
        )
        us = graph_us(lambda: [prefill.run(q, (k, v), pool[:, i, 0], pool[:, i, 1], out) for i in range(layers)])  # noqa: B023
        tflops = 4 * Q_HEADS * DIM * new * (prefix + new / 2) * layers / us / 1e6
        result(f"prefill new={new} prefix={prefix} us={us / layers:.1f} TFLOP/s={tflops:.0f}")


PARTS: dict[str, Callable[[float], None]] = {
    "linears": bench_linears, "experts": bench_experts, "kernels": bench_kernels, "sampler": bench_sampler,
    "attention": bench_attention,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    rate = read_rate()
    result(
        f"peak {torch.cuda.get_device_name()} read={rate / 1e3:.0f} GB/s torch={torch.__version__} "
        f"triton={triton.__version__}"
    )
    for part in sys.argv[1:] or PARTS:
        if part != "peak":
            PARTS[part](rate)


if __name__ == "__main__":
    main()
