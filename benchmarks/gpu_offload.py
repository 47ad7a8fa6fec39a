"""Weights in the host's memory beside one GPU: milliseconds of a decode step, by how much of them is there, and how.

``python -m benchmarks.gpu_offload [--layers 32] [--modes off prefetch:25% prefetch:50% uva:25% uva:50%]``:
Llama-3.1-8B's shape with made-up weights in bfloat16. Prints lines that begin with RESULT: what was asked for and what
went to the host; then each step beside the longer of two, the same step with all weights on the device, and its bytes
at the rate of the bus that was measured in the same run; and a step while KV comes back from a host tier.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_engine import BLOCK, ROW, decode_ms, scattered
from benchmarks.shapes import SHAPES
from pd_serve.compute.cuda import bus
from pd_serve.compute.cuda.executor import CudaExecutor, Settings
from pd_serve.compute.cuda.host_copies import CudaHostMover
from pd_serve.kv.layout import KVLayout
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.upload import Upload
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops, Ranks
from pd_serve.models.offload import Wanted

MODES = ["off", "prefetch:25%", "prefetch:50%", "uva:25%", "uva:50%"]
CONTEXT, MAX_LEN, BATCHES, STEPS, PROMPT = 1024, 2048, (1, 32), 15, 8192


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def start(folder: Path, wanted: Wanted | None) -> tuple[CudaExecutor, KVLayout]:
    config = ModelConfig.from_directory(folder, None).for_length(MAX_LEN)
    layout = KVLayout(BLOCK, "bfloat16", config.layer_groups())

    def load(ops: Ops, device: str, _ranks: Ranks | None) -> Decoder:
        with Upload(torch.device(device), pin=should_pin_memory(True, 0)) as upload:
            return load_decoder(
                folder, config, "bfloat16", "dummy", ops=ops, max_positions=MAX_LEN + 1, device=device, upload=upload
            )

    settings = Settings(32, 512, MAX_LEN, gpu_memory_utilization=0.6, weight_offload=wanted)
    return CudaExecutor(config, layout, load, settings), layout


class Prompts:
    """A host tier beside the weights, from which KV of prompts of 8,192 tokens comes back, one after another."""

    def __init__(self, executor: CudaExecutor, layout: KVLayout, used: set[int]) -> None:
        memory = TierMemory(layout, (PROMPT // BLOCK + 2) * layout.block_bytes(0))
        self._mover = CudaHostMover(executor.memory()[0], memory, pin=should_pin_memory(True, 0))
        free = [block for block in range(1, executor.num_blocks) if block not in used]
        self._copies = [Copy(0, block, slot + 1) for slot, block in enumerate(free[: PROMPT // BLOCK])]
        self.size_bytes = len(self._copies) * layout.block_bytes(0)
        self._mover.store(self._copies)
        self.seconds: list[float] = []
        self._stop = threading.Event()

    def load(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            self._mover.load(self._copies)
            self.seconds.append(time.perf_counter() - start)

    def beside(self, decode: Callable[[], float]) -> float:
        """Milliseconds of a step meanwhile."""
        self._stop.clear()
        self.seconds.clear()
        thread = threading.Thread(target=self.load)
        thread.start()
        ms = decode()
        self._stop.set()
        thread.join()
        return ms

    def close(self) -> None:
        self._mover.close()


def measure(folder: Path, name: str, alone: dict[int, float], pieces: list[int]) -> None:
    mode, _, size = name.partition(":")
    wanted = None if mode == "off" else Wanted(mode, size)
    resident, begin = resident_bytes(), time.perf_counter()
    executor, layout = start(folder, wanted)
    seconds, offload = time.perf_counter() - begin, executor._offload
    print(f"RESULT {name} start {seconds:.1f} s", flush=True)
    bytes_ms = 0.0
    if offload is not None:
        made, ring = offload.plan_made, offload.ring
        bytes_ms = offload.bus_ms
        print(
            f"RESULT {name} asked {made.asked_bytes} planned {made.host_bytes} host "
            f"{sum(home.buffer.size for home in offload.homes)} resident +{resident_bytes() - resident}, "
            f"{len(made.layers)} layers, {0 if ring is None else ring.num_slots} slots, "
            f"copies {offload.copy_rate / 1e9:.1f}, reads {offload.read_rate / 1e9:.1f} GB/s",
            flush=True,
        )
    rng = np.random.default_rng(1)
    for batch in BATCHES:
        tables = scattered(rng, executor.num_blocks, batch, -(-(CONTEXT + 64) // BLOCK))
        ms = decode_ms(executor, batch, CONTEXT, tables, ROW, STEPS)
        alone.setdefault(batch, ms)
        limit = max(alone[batch], bytes_ms)
        print(
            f"RESULT {name} batch={batch} {ms:.2f} ms (computing {alone[batch]:.2f}, bus {bytes_ms:.2f}: "
            f"{ms / limit - 1:+.1%})",
            flush=True,
        )
    prompts = Prompts(executor, layout, set(tables.ravel().tolist()))
    for mib in pieces if mode == "prefetch" else pieces[:1]:
        bus.COPY_BYTES = mib << 20
        say_beside(prompts, f"{name} copies of {mib} MiB", partial(decode_ms, executor, 1, CONTEXT, tables, ROW, STEPS))
    prompts.close()
    executor.close()


def say_beside(prompts: Prompts, what: str, decode: Callable[[], float]) -> None:
    """A step of one row alone, and beside KV that comes back."""
    alone, beside = decode(), prompts.beside(decode)
    seconds = prompts.seconds[:-1] or prompts.seconds  # the last one was not beside steps to its end
    print(
        f"RESULT {what}: batch=1 {alone:.2f} ms, {beside:.2f} beside KV of {PROMPT} tokens, "
        f"{prompts.size_bytes / 1e9:.2f} GB, in {statistics.median(seconds) * 1e3:.0f} ms each ({len(seconds)})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--copy-mib", nargs="+", type=int, default=[bus.COPY_BYTES >> 20], help="of prefetch's copies")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with tempfile.TemporaryDirectory() as name:
        model = {**SHAPES["llama-3.1-8b"], "num_hidden_layers": options.layers}
        (Path(name) / "config.json").write_text(json.dumps(model))
        alone: dict[int, float] = {}
        for mode in options.modes:
            measure(Path(name), mode, alone, options.copy_mib)
            torch.cuda.set_stream(torch.cuda.default_stream())
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
