"""How long device work takes, as it will run: replayed from a CUDA graph; and where that is kept."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import triton

from pd_serve import timings


def cache_folder(kind: str, device: torch.device, *kernels: ModuleType) -> Path:
    """For what was timed on GPUs like ``device`` with these versions, and with what these modules contain."""
    sources = b"".join(inspect.getsource(module).encode() for module in kernels)
    processors = str(torch.cuda.get_device_properties(device).multi_processor_count)
    versions = torch.__version__, triton.__version__, hashlib.sha256(sources).hexdigest()
    return timings.cache_folder(kind, torch.cuda.get_device_name(device), processors, *versions)


def graph_us(work: Callable[[], object], replays: int = 7) -> float:
    """Microseconds of one replay of a graph of ``work``: the median of ``replays``. Runs ``work`` once before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]
