"""Sums of activations over the ranks of an engine, as they run in CUDA graphs, by whichever way is the fastest here.

Owned by a rank's engine. NCCL's all-reduce is the fastest for few rows, torch's two-shot over symmetric memory
(each rank sums its share and stores it with all others, over NVLink) for many; where the one begins and the other ends
is timed at start (:func:`choose`) and kept on disk, by GPU, number of ranks, driver and torch. All ranks call
everything here, in the same order.

Whatever the way, all ranks get the same bits, and get them again from the same inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pd_serve import timings
from pd_serve.distributed.group import Group
from pd_serve.timings import Timed, by_rows

log = logging.getLogger(__name__)

LADDER = (1, 8, 32, 64, 128, 256, 1024, 8192)  # rows that are timed; others use what the next larger one uses
_LAUNCHES = 64  # in a graph that is timed: ranks do not begin at the same microsecond
_REPLAYS = 9
_ALIGNMENT = 16  # bytes, of a row: what the two-shot kernel moves at once


class Way(StrEnum):
    LIBRARY = "library"  # NCCL
    TWO_SHOT = "two_shot"


class AllReduce:
    """Sums ``[rows, width]`` over the ranks, in a buffer of its own that all of them can reach.

    The linear before it writes into :meth:`input`, and the sum is there: ``all_reduce(rows)``. One after the
    other on one stream; the next may be written as soon as the last was read.
    """

    def __init__(
        self, group: Group, max_rows: int, width: int, dtype: torch.dtype, timed: Sequence[Timed[Way]] | None = None
    ) -> None:
        """``timed``: by :func:`choose`; None: the library's, for any number of rows."""
        self._group = group
        self._ways = by_rows(timed or ())
        self._symmetric = any(way is Way.TWO_SHOT for way in self._ways)
        if self._symmetric:
            self._buffer = _symmetric_buffer(group, max_rows, width, dtype)
        else:
            self._buffer = torch.empty((max_rows, width), dtype=dtype, device=group.device)

    def input(self, rows: int) -> Tensor:
        """``[rows, width]``: where the rank's own part is to be written."""
        return self._buffer[:rows]

    def __call__(self, rows: int) -> Tensor:
        """The sum of all ranks' first ``rows`` rows, in the place of :meth:`input`."""
        part = self._buffer[:rows]
        if rows:
            _sum(self._way(rows), part, self._group)
        return part

    def _way(self, rows: int) -> Way:
        if not self._ways:
            return Way.LIBRARY
        return self._ways[min(rows, len(self._ways) - 1)]

    def close(self) -> None:
        """Gives the buffer back: before the group is closed, and when no graph is replayed any more."""
        del self._buffer


def _sum(way: Way, part: Tensor, group: Group) -> None:
    if way is Way.TWO_SHOT:
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", group.name)
    else:
        dist.all_reduce(part)


def _symmetric_buffer(group: Group, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty((rows, width), dtype=dtype, device=group.device)
    symmetric.rendezvous(buffer, group.name)  # type: ignore[arg-type]
    return buffer


def choose(
    group: Group,
    max_rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Timed[Way], ...]:
    """The fastest way for each number of rows of the ladder up to ``max_rows``: the same on all ranks.

    From rank 0's ``cache`` (the folder), else timed now, in a second or two, and kept there. Nothing is timed, and the
    library's way is used, off GPUs and where ranks cannot reach each other's memory.
    """
    if group.size == 1 or group.device.type != "cuda" or width * dtype.itemsize % _ALIGNMENT:
        return ()
    ladder = [*(rows for rows in LADDER if rows < max_rows), max_rows]
    file = (cache or _cache_folder(group)) / f"{width}-{max_rows}-{str(dtype).removeprefix('torch.')}.json"
    kept = [timings.read(file, ladder, _named) if group.rank == 0 else None]
    dist.broadcast_object_list(kept, device=group.device)
    if kept[0] is not None:
        return kept[0]
    if progress:
        progress(f"timing sums over {group.size} GPUs")
    timed = _time(group, ladder, width, dtype)
    if group.rank == 0 and timed:
        timings.write(file, timed)
    return timed


def _time(group: Group, ladder: Sequence[int], width: int, dtype: torch.dtype) -> tuple[Timed[Way], ...]:
    try:
        buffer = _symmetric_buffer(group, ladder[-1], width, dtype)
        buffer.zero_()
        works = True
    except RuntimeError as error:
        log.warning("ranks cannot reach each other's memory (%s): sums over them are NCCL's", error)
        works = False
    if _most(group, float(not works)):
        return ()
    timed = []
    for rows in ladder:
        us = {way: _most(group, _us(group, way, buffer[:rows])) for way in Way}
        way = min(us, key=lambda w: us[w])
        timed.append(Timed(rows, way, us[way], us[Way.LIBRARY]))
    return tuple(timed)


def _us(group: Group, way: Way, part: Tensor) -> float:
    """Microseconds of a sum, in a graph of several."""
    stream = torch.cuda.Stream(group.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _sum(way, part, group)
    torch.cuda.synchronize(group.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_LAUNCHES):
            _sum(way, part, group)
    times: list[float] = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        _sum(Way.LIBRARY, part[:1], group)  # ranks begin together
        start.record()
        graph.replay()
        end.record()
        group.wait(end)
        times.append(start.elapsed_time(end) * 1e3 / _LAUNCHES)
    return sorted(times)[len(times) // 2]


def _most(group: Group, value: float) -> float:
    """The largest of all ranks' values."""
    one = torch.tensor([value], device=group.device)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    return float(one)


def _cache_folder(group: Group) -> Path:
    name = torch.cuda.get_device_name(group.device)
    return timings.cache_folder("all_reduce", name, str(group.size), torch.__version__)


def _named(rows: int, name: str) -> Way:
    return Way(name)
