"""Weights in the host's memory beside one GPU: milliseconds of a decode step, by how much of them is there, and how.

``python -m benchmarks.gpu_offload [--layers 32] [--modes off prefetch:25% prefetch:50% uva:25% uva:50%]``:
Llama-3.1-8B's shape with made-up weights in bfloat16. Prints lines that begin with RESULT: what was asked for and what
went to the host; then each step beside the longer of two, the same step with all weights on the device, and its bytes
at the rate of the bus that was measured in the same run; and a step while another stream brings bytes to the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_engine import BLOCK, ROW, decode_ms, scattered
from benchmarks.shapes import SHAPES
from pd_serve.compute.cuda.executor import CudaExecutor, Settings
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.upload import Upload
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops, Ranks
from pd_serve.models.offload import Wanted

MODES = ["off", "prefetch:25%", "prefetch:50%", "uva:25%", "uva:50%"]
CONTEXT, MAX_LEN, BATCHES, STEPS = 1024, 2048, (1, 32), 15


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


class Rival:
    """Copies from the host to the device all the time, 2 MiB each, as KV that comes back or is pulled over the bus."""

    def __init__(self) -> None:
        self._source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=should_pin_memory(True, 0))
        self._target = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self._stop = threading.Event()
        self.copied = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not self._stop.is_set():
                for at in range(0, len(self._source), 2 << 20):
                    part = slice(at, at + (2 << 20))
                    self._target[part].copy_(self._source[part], non_blocking=True)
                torch.cuda.current_stream().synchronize()
                self.copied += len(self._source)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def measure(folder: Path, name: str, alone: dict[int, float]) -> None:
    mode, _, size = name.partition(":")
    wanted = None if mode == "off" else Wanted(mode, size)
    resident, begin = resident_bytes(), time.perf_counter()
    executor, _ = start(folder, wanted)
    seconds, offload = time.perf_counter() - begin, executor._offload
    print(f"RESULT {name} start {seconds:.1f} s", flush=True)
    bytes_ms = 0.0
    if offload is not None:
        made, ring = offload.plan_made, offload.ring
        moved = made.host_bytes if ring is None else ring.step_bytes
        bytes_ms = moved / offload.bus_rate * 1e3
        print(
            f"RESULT {name} asked {made.asked_bytes} planned {made.host_bytes} host "
            f"{sum(home.buffer.size for home in offload._homes.values())} resident +{resident_bytes() - resident}, "
            f"{len(made.layers)} layers, {0 if ring is None else ring.num_slots} slots, "
            f"bus {offload.bus_rate / 1e9:.1f} GB/s",
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
    if name == "prefetch:25%":
        rival = Rival()
        copied, begin = rival.copied, time.perf_counter()
        ms = decode_ms(executor, 1, CONTEXT, tables, ROW, STEPS)
        rate = (rival.copied - copied) / (time.perf_counter() - begin)
        rival.stop()
        print(f"RESULT {name} batch=1 beside copies at {rate / 1e9:.1f} GB/s: {ms:.2f} ms", flush=True)
    executor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--modes", nargs="+", default=MODES)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with tempfile.TemporaryDirectory() as name:
        model = {**SHAPES["llama-3.1-8b"], "num_hidden_layers": options.layers}
        (Path(name) / "config.json").write_text(json.dumps(model))
        alone: dict[int, float] = {}
        for mode in options.modes:
            measure(Path(name), mode, alone)
            torch.cuda.set_stream(torch.cuda.default_stream())
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
