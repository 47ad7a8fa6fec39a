"""Weights from files to one GPU: GB/s by the engine's loader, beside what the files and the bus give.

``python -m benchmarks.gpu_load [--layers 8] [--folder /tmp]``. Writes a checkpoint of Llama-3.1-8B's shape with so many
layers, in bfloat16, and deletes it afterwards. Prints lines that begin with RESULT. *cold*: the files' pages were
given back before (which some file systems and containers do not do).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.shapes import LLAMA
from pd_serve.compute.cuda.ops import CudaOps
from pd_serve.memory.upload import Upload
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder

THREADS = 8
READ_BYTES = 4 << 20


def write(folder: Path, layers: int) -> int:
    """Bytes."""
    config = {**LLAMA, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, vocab, kv = 4096, 14336, 128256, 1024
    ends = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    of_layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shards = [ends]
    shards += [{f"model.layers.{i}.{name}.weight": shape for name, shape in of_layer.items()} for i in range(layers)]
    names = {}
    for i, shard in enumerate(shards):
        file = f"model-{i:05}.safetensors"
        save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shard.items()}, folder / file)
        names.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Asks the kernel to give the files' pages back."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: Path) -> None:
    """All bytes, by as many threads as the loader has."""

    def read(path: Path, at: int) -> None:
        buffer = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [buffer], at)

    with ThreadPoolExecutor(THREADS) as pool:
        for path in sorted(folder.glob("*.safetensors")):
            for at in range(0, path.stat().st_size, READ_BYTES):
                pool.submit(read, path, at)


def load(folder: Path, *, upload: bool) -> None:
    config = ModelConfig.from_directory(folder, None).for_length(8192)
    device = torch.device("cuda", 0)
    with Upload(device, pin=True) if upload else nullcontext() as threads:
        load_decoder(
            folder, config, "bfloat16", ops=CudaOps(), max_positions=8192, device=str(device), upload=threads
        )  # fmt: skip
    torch.cuda.synchronize()


def timed(what: str, size: int, work: Callable[[], object]) -> None:
    torch.cuda.empty_cache()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(f"RESULT {what}: {size / seconds / 1e9:.2f} GB/s ({seconds:.2f} s)", flush=True)


def measure_bus() -> None:
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda:0")

    def copy() -> None:
        target.copy_(pinned)
        torch.cuda.synchronize()

    copy()
    timed("bus, pinned", len(pinned), copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write(folder, options.layers)
        print(f"RESULT checkpoint of {size / 1e9:.2f} GB, {os.cpu_count()} cores", flush=True)
        measure_bus()
        read_files(folder)
        timed("files, warm", size, lambda: read_files(folder))
        timed("loader, warm", size, lambda: load(folder, upload=True))
        timed("loader, warm, again", size, lambda: load(folder, upload=True))
        timed("plain copies, warm", size, lambda: load(folder, upload=False))
        forget(folder)
        timed("files, cold", size, lambda: read_files(folder))
        forget(folder)
        timed("loader, cold", size, lambda: load(folder, upload=True))
        forget(folder)
        timed("plain copies, cold", size, lambda: load(folder, upload=False))


if __name__ == "__main__":
    main()
