"""Sleep level 1 and waking of 16 GiB of weights, beside what the bus carries in the same run.

python benchmarks/sleep.py [--gib 16]
"""

from __future__ import annotations

import argparse
import time

import torch

from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.sleep import DeviceMemory
from pd_serve.memory.usage import WEIGHTS

GIB = 1 << 30


def bus(tensor: torch.Tensor) -> tuple[float, float]:
    """GB/s to the host and back, pinned, one large copy each, the best of three."""
    host = torch.empty(tensor.numel(), dtype=torch.uint8, pin_memory=True)
    best = [0.0, 0.0]
    for _ in range(3):
        for at, (target, source) in enumerate(((host, tensor), (tensor, host))):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best[at] = max(best[at], tensor.numel() / (time.perf_counter() - start) / 1e9)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=16)
    options = parser.parse_args()
    size = options.gib * GIB
    memory = DeviceMemory(0, pin=should_pin_memory(True, 0))
    to_host, to_device = bus(torch.empty(4 * GIB, dtype=torch.uint8, device="cuda:0"))
    torch.cuda.empty_cache()
    with memory.use_memory_pool(WEIGHTS):  # as a loader does: many tensors of a few hundred MiB
        tensors = [torch.full((GIB // 4,), i % 251, dtype=torch.uint8, device="cuda:0") for i in range(4 * options.gib)]
    addresses = [t.data_ptr() for t in tensors]
    start = time.perf_counter()
    memory.prepare()
    prepared_s = time.perf_counter() - start
    for turn in range(3):
        free = torch.cuda.mem_get_info()[0]
        start = time.perf_counter()
        memory.sleep(1)
        slept_s = time.perf_counter() - start
        given_back = torch.cuda.mem_get_info()[0] - free
        start = time.perf_counter()
        memory.wake()
        woken_s = time.perf_counter() - start
        print(
            f"RESULT sleep {size / slept_s / 1e9:.1f} GB/s (bus {to_host:.1f}, x{to_host * slept_s * 1e9 / size:.2f}), "
            f"wake {size / woken_s / 1e9:.1f} GB/s (bus {to_device:.1f}, x{to_device * woken_s * 1e9 / size:.2f}), "
            f"{given_back / GIB:.1f} GiB given back, preparing {prepared_s:.1f} s, turn {turn}",
            flush=True,
        )
    assert addresses == [t.data_ptr() for t in tensors]
    assert all(bool((t == i % 251).all()) for i, t in enumerate(tensors)), "content was lost"
    print("RESULT same addresses, same content")


if __name__ == "__main__":
    main()
