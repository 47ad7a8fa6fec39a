"""Steps of the executor on one GPU: a model's shape in bfloat16 with made-up weights, by batch size and context.

``python -m benchmarks.gpu_engine [--shape llama-3.1-8b | qwen3-30b-a3b] [--weights bfloat16 | fp8-rows | ...]
[--kv bfloat16 | float8_e4m3fn] [--layers 32] [--eager] [--few] [--tp 2]``. Of a mixture of experts the bytes of weights
are those of the experts that so many rows go to where each of them is as likely. Prints lines that begin with RESULT:
seconds of a start, milliseconds of a decode step as the engine's loop would see them (launch, then collect the one
before), beside what the bytes of weights and KV take at the read rate measured here, and milliseconds of a prefill.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import SHAPES, WEIGHTS
from pd_serve.compute.cuda.executor import CudaExecutor, Launched, Settings
from pd_serve.compute.step import SAMPLING, SamplingRow, Step
from pd_serve.engine.ranks import meet
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.upload import Upload
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops, Ranks
from pd_serve.models.layers import SparseMoe

BLOCK, MAX_LEN = int(os.environ.get("PD_SERVE_BLOCK_SIZE", "64")), 10_240
ROW = SamplingRow(0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, -1)


def read_rate() -> float:
    """Bytes a second of reading a large tensor once."""
    x = torch.zeros(1 << 31, dtype=torch.int8, device="cuda").view(torch.int64)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        x.max()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    rate = x.numel() * 8 / min(times) * 1e3
    del x
    torch.cuda.empty_cache()
    return rate


def step(counts: list[int], prefix: int, tables: np.ndarray, ahead: bool, sampling: SamplingRow = ROW) -> Step:
    seqs, total = len(counts), sum(counts)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(prefix, prefix + count) for count in counts]).astype(np.int64)
    row = np.repeat(np.arange(seqs), counts)
    blocks = -(-(prefix + max(counts)) // BLOCK)
    decodes = seqs if prefix and max(counts) == 1 else 0
    return Step(
        tokens=np.random.default_rng(0).integers(0, 100_000, total), positions=positions, query_start=starts,
        seq_lens=(np.array(counts) + prefix).astype(np.int32),
        slots=[tables[row, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK],
        block_tables=[tables[:seqs, :blocks]], logits_rows=starts[1:].astype(np.int64) - 1, num_decode=decodes,
        from_samples=np.arange(decodes, dtype=np.int32) if ahead else np.full(decodes, -1, np.int32),
        sampled_rows=np.arange(seqs, dtype=np.int64), sampling=np.array([tuple(sampling)] * seqs, SAMPLING),
    )  # fmt: skip


def scattered(rng: np.random.Generator, num_blocks: int, batch: int, blocks: int) -> np.ndarray:
    return (rng.permutation(num_blocks - 1)[: batch * blocks] + 1).astype(np.int32).reshape(batch, blocks)


def decode_ms(
    executor: CudaExecutor, batch: int, context: int, tables: np.ndarray, sampling: SamplingRow, steps: int = 40
) -> float:
    """Median between two collected steps, one step ahead, after a prefill of nothing (KV is what is there)."""
    times, before, last = [], None, time.perf_counter()
    for i in range(steps):
        launched: Launched = executor.launch(step([1] * batch, context + i, tables, i > 0, sampling))
        if before is not None:
            executor.collect(before)
            now = time.perf_counter()
            times.append((now - last) * 1e3)
            last = now
        before = launched
    assert before is not None
    executor.collect(before)
    return statistics.median(times[steps // 5 :])


def beside_ms(executor: CudaExecutor, chunk: int, decodes: int, tables: np.ndarray, prefix: int = 1024) -> float:
    """Of a step in which ``decodes`` sequences of ``prefix`` tokens go on, and another by a chunk of its prompt."""
    mixed = step([1] * decodes + [chunk], prefix, tables, False)
    mixed.num_decode, mixed.from_samples = decodes, np.full(decodes, -1, np.int32)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        executor.collect(executor.launch(mixed))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def make_executor(
    layers: int | None = None,
    *,
    eager: bool = False,
    shape: str = "llama-3.1-8b",
    weights: str = "bfloat16",
    kv: str = "bfloat16",
    rank: int = 0,
    ranks: int = 1,
    directory: str = "",
) -> tuple[CudaExecutor, KVLayout]:
    """Of this shape with made-up weights. ``directory``: where ranks meet."""
    with tempfile.TemporaryDirectory() as folder:
        model = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
        model = {**model, "quantization_config": WEIGHTS[weights]}
        (Path(folder) / "config.json").write_text(json.dumps(model))
        config = ModelConfig.from_directory(Path(folder), None).for_length(MAX_LEN).for_rank(rank, ranks)
        layout = KVLayout(BLOCK, kv, config.layer_groups())

        def load(ops: Ops, device: str, others: Ranks | None) -> Decoder:
            with Upload(torch.device(device), pin=True) as upload:
                return load_decoder(
                    Path(folder), config, "bfloat16", "dummy", ops=ops, max_positions=MAX_LEN + 1, device=device,
                    upload=upload, ranks=others,
                )  # fmt: skip

        settings = Settings(256, 8192, MAX_LEN, eager, gpu_memory_utilization=0.88, dtype="bfloat16", device=rank)
        find = partial(meet, directory, rank, ranks) if ranks > 1 else None
        return CudaExecutor(config, layout, load, settings, find), layout


def weight_bytes(executor: CudaExecutor, rows: int) -> float:
    """Of those that a decode step of ``rows`` reads."""
    weights, experts = executor._runner.model.weights, executor._config.experts
    total = float(weights.size_bytes)
    if experts is not None:
        unused = (1 - experts.per_token / experts.count) ** rows
        layers = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, SparseMoe)]
        total -= unused * sum(t.numel() * t.element_size() for mlp in layers for t in mlp.experts.tensors)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16")
    parser.add_argument("--kv", choices=("bfloat16", "float8_e4m3fn"), default="bfloat16")
    parser.add_argument("--few", action="store_true", help="fewer batches, contexts and prompts")
    parser.add_argument("--tp", type=int, default=1, help="ranks: GPUs")
    parser.add_argument("--rank", type=int, default=0, help="of this process; the first starts the others")
    parser.add_argument("--directory", default="", help="where ranks meet")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with tempfile.TemporaryDirectory() as folder:
        options.directory = options.directory or folder
        others = [] if options.rank else [start_rank(rank, folder) for rank in range(1, options.tp)]
        try:
            measure(options)
            for other in others:
                other.wait(20)
        finally:
            for other in others:
                other.kill()


def start_rank(rank: int, directory: str) -> subprocess.Popen[bytes]:
    """It does as this one does, and says nothing."""
    more = ["--rank", str(rank), "--directory", directory]
    command = [sys.executable, "-m", "benchmarks.gpu_engine", *sys.argv[1:], *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def measure(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    executor, layout = make_executor(
        options.layers, eager=options.eager, shape=options.shape, weights=options.weights, kv=options.kv,
        rank=options.rank, ranks=options.tp, directory=options.directory,
    )  # fmt: skip
    print(f"RESULT start {time.perf_counter() - begin:.1f} s, {executor.num_blocks} blocks", flush=True)
    weights = executor._runner.model.weights.size_bytes
    each = layout.block_bytes(0) / BLOCK
    rate = read_rate()
    print(f"RESULT read {rate / 1e9:.0f} GB/s, weights {weights / 1e9:.2f} GB", flush=True)
    rng = np.random.default_rng(1)
    nucleus = ROW._replace(temperature=0.8, top_p=0.95, seed=3)
    few, many = ((1, 1024), (32, 1024), (256, 1024)), ((8, 1024), (64, 1024), (128, 1024), (1, 8192))
    for batch, context in few if options.few else sorted(few + many, key=lambda size: (size[1], size[0])):
        blocks = -(-(context + 64) // BLOCK)
        if batch * blocks >= executor.num_blocks:
            continue
        tables = scattered(rng, executor.num_blocks, batch, blocks)
        limit = (weight_bytes(executor, batch) + batch * context * each) / rate * 1e3
        ms, sampled = (decode_ms(executor, batch, context, tables, row) for row in (ROW, nucleus))
        print(
            f"RESULT decode batch={batch} context={context} {ms:.2f} ms (bytes {limit:.2f}, {limit / ms:.2f}), "
            f"top-p {sampled:.2f} ms",
            flush=True,
        )
    for tokens in (2048, 8192) if options.few else (512, 2048, 8192):
        tables = (np.arange(-(-tokens // BLOCK)) + 1).astype(np.int32)[None]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            executor.collect(executor.launch(step([tokens], 0, tables, False)))
            times.append((time.perf_counter() - start) * 1e3)
        print(f"RESULT prefill {tokens} {statistics.median(times):.1f} ms", flush=True)
    for decodes in (8, 32):
        tables = scattered(rng, executor.num_blocks, decodes + 1, -(-(1024 + 512) // BLOCK))
        found = {chunk: beside_ms(executor, chunk, decodes, tables) for chunk in (512 - decodes, 512)}
        words = ", ".join(f"{ms:.2f} ms with a chunk of {chunk}" for chunk, ms in found.items())
        print(f"RESULT {decodes} decodes at 1024: {words}", flush=True)
    executor.close()


if __name__ == "__main__":
    main()
