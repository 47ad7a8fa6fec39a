"""Sums over two GPUs in CUDA graphs: right, the same each time, and an end when a rank ends."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pd_serve.distributed.all_reduce import AllReduce, Way, choose
from pd_serve.distributed.group import Group, RankLost
from pd_serve.timings import Timed
from tests.distributed.ranks import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WIDTH, MOST = 4096, 2048
ROWS = (1, 2, 3, 7, 31, 33, 64, 100, 255, 256, 1000, 2047, 2048)


def captured(group: Group, all_reduce: AllReduce, rows: Sequence[int]) -> dict[int, torch.cuda.CUDAGraph]:
    graphs = {}
    stream = torch.cuda.Stream()
    for n in rows:
        with torch.cuda.stream(stream):
            all_reduce(n)
        torch.cuda.synchronize()
        graphs[n] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[n], stream=stream):
            all_reduce.input(n).mul_(2)
            all_reduce(n)
    return graphs


def waited(group: Group) -> None:
    event = torch.cuda.Event()
    event.record()
    group.wait(event)


def sums(group: Group) -> object:
    """Each way for all rows, and what was chosen."""
    cache = Path(tempfile.gettempdir()) / f"pd-all-reduce-{os.getppid()}"
    began = time.monotonic()
    chosen = choose(group, MOST, WIDTH, torch.bfloat16, cache=cache)
    timing_s = time.monotonic() - began
    assert choose(group, MOST, WIDTH, torch.bfloat16, cache=cache) == chosen
    errors = {}
    for name, timed in (
        ("library", None),
        ("two_shot", [Timed(MOST, Way.TWO_SHOT, 0.0, 0.0)]),
        ("chosen", chosen),
    ):
        all_reduce = AllReduce(group, MOST, WIDTH, torch.bfloat16, timed)
        graphs = captured(group, all_reduce, ROWS)
        torch.manual_seed(group.rank)
        worst = 0.0
        for rows, graph in graphs.items():
            x = torch.randn(rows, WIDTH, device=group.device, dtype=torch.bfloat16)
            want = x.float() * 2
            dist.all_reduce(want)
            results = []
            for _ in range(3):
                all_reduce.input(rows).copy_(x)
                graph.replay()
                waited(group)
                results.append(all_reduce.input(rows).clone())
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            others = results[0].clone()
            dist.broadcast(others, 0)
            assert torch.equal(others, results[0]), "ranks differ"
            assert torch.equal(results[0], want.bfloat16()), (name, rows)  # of two ranks: rounded once
            worst = max(worst, float((results[0].float() - want).norm() / want.norm()))
        for _ in range(50):  # one after the other, without waiting
            for graph in graphs.values():
                graph.replay()
        waited(group)
        errors[name] = worst
        del graphs, graph
        all_reduce.close()
    return {
        "timing_s": timing_s,
        "errors": errors,
        "chosen": [(t.rows, str(t.way), t.us, t.library_us) for t in chosen],
    }


def test_sums_are_right_and_the_same_each_time() -> None:
    first, second = run(sums, "cuda")
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first["chosen"] == second["chosen"]
    for rows, way, us, library_us in first["chosen"]:
        print(f"RESULT all_reduce rows {rows} {way} {us:.1f} us, NCCL {library_us:.1f} us")
    print(f"RESULT all_reduce timing took {first['timing_s']:.2f} s, errors {first['errors']}")


kept: list[object] = []  # what the device still works on: to free it would wait


def one_dies(group: Group, way: Way) -> object:
    all_reduce = AllReduce(group, 64, WIDTH, torch.bfloat16, [Timed(64, way, 0.0, 0.0)])
    graph = captured(group, all_reduce, (64,))[64]
    kept.extend((all_reduce, graph))
    graph.replay()
    waited(group)
    if group.rank == 1:
        os._exit(3)
    began = time.monotonic()
    graph.replay()
    with pytest.raises(RankLost, match="rank 1 of 2 has ended"):
        waited(group)
    return time.monotonic() - began


def one_dies_in_nccl(group: Group) -> object:
    return one_dies(group, Way.LIBRARY)


def one_dies_in_two_shot(group: Group) -> object:
    return one_dies(group, Way.TWO_SHOT)


@pytest.mark.parametrize("scenario", [one_dies_in_nccl, one_dies_in_two_shot])
def test_a_rank_that_ends_in_mid_sum_is_noticed(scenario: object) -> None:
    took, silent = run(scenario, "cuda")  # type: ignore[arg-type]
    assert isinstance(took, float), took
    assert silent is None
    assert took < 10
