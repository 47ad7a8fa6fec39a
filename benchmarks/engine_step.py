"""How long one step of the engine's model takes: decodes at several batch sizes and contexts, and whole prefills.

    python benchmarks/engine_step.py [MODEL] [--threads 1] [--dtype bfloat16] [--load-format dummy]

MODEL is an alias, a directory or a GGUF file (default: the default model), taken as `pd-serve up` takes it. Prints
milliseconds a step (the median and the least of --repeats), without scheduler, sampler and transfer. On a busy
machine look at the least, and bind it to a core of its own with `taskset -c`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.step import Step
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pool import HostPool
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.models.source import resolve

BLOCK_SIZE = 16
BATCH_SIZES = (1, 8)
CONTEXTS = (256, 512, 1024)


def step_of(groups: int, num_seqs: int, new_tokens: int, length: int) -> Step:
    """``num_seqs`` sequences of ``length`` tokens, of which the last ``new_tokens`` are computed; scattered blocks."""
    blocks = -(-length // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(num_seqs * blocks).astype(np.int32).reshape(num_seqs, blocks) + 1
    positions = np.tile(np.arange(length - new_tokens, length, dtype=np.int64), num_seqs)
    rows = np.repeat(np.arange(num_seqs), new_tokens)
    slots = tables[rows, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    return Step(
        tokens=np.arange(num_seqs * new_tokens, dtype=np.int64) % 1000,
        positions=positions,
        query_start=np.arange(num_seqs + 1, dtype=np.int32) * new_tokens,
        seq_lens=np.full(num_seqs, length, np.int32),
        slots=[slots] * groups,
        block_tables=[tables] * groups,
        logits_rows=np.arange(1, num_seqs + 1, dtype=np.int64) * new_tokens - 1,
        num_decode=num_seqs if new_tokens == 1 else 0,
    )


def measure(runner: Runner, step: Step, repeats: int) -> str:
    runner.execute(step)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        runner.execute(step)
        times.append(1e3 * (time.perf_counter() - begin))
    return f"{statistics.median(times):8.2f} ms   least {min(times):8.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "dummy"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()

    files = resolve(args.model, args.dtype, args.load_format)
    config = ModelConfig.from_directory(files.directory)
    layout = KVLayout(BLOCK_SIZE, files.dtype, config.layer_groups())
    num_blocks = max(BATCH_SIZES) * layout.blocks_for(max(CONTEXTS)) + 1
    pool = HostPool(layout, (num_blocks,) * len(layout.groups))
    for region in pool.tensors():  # or all of it would be the kernel's one page of zeros, and in the cache
        region.view(getattr(torch, files.dtype)).normal_()
    torch.set_num_threads(args.threads)
    model = load_decoder(files.directory, config, files.dtype, files.load_format, ops=ops, max_positions=max(CONTEXTS))
    runner = Runner(model, config, layout, pool.tensors(), args.threads)
    begin = time.perf_counter()
    runner.warm_up()
    print(f"{files.name} {files.dtype}, {args.threads} threads; warm-up {time.perf_counter() - begin:.2f} s")

    groups = len(layout.groups)
    for num_seqs in BATCH_SIZES:
        for context in CONTEXTS:
            times = measure(runner, step_of(groups, num_seqs, 1, context), args.repeats)
            print(f"decode  batch {num_seqs}  context {context:5}: {times}")
    for context in CONTEXTS:
        times = measure(runner, step_of(groups, 1, context, context), max(3, args.repeats // 5))
        print(f"prefill {context:5} tokens           : {times}")


if __name__ == "__main__":
    main()
