"""``bench transfer`` with real processes and real NIXL, in host memory; and its arithmetic."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pd_serve import config
from pd_serve.bench.transfer import content, plot, report
from pd_serve.bench.transfer.job import Job, cases, layouts, num_blocks
from pd_serve.bench.transfer.reading import _table
from pd_serve.bench.transfer.run import run
from pd_serve.errors import ConfigError
from pd_serve.memory.pool import HostPool
from pd_serve.transfer.slices import slicings
from tests import nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(100)]

COMMAND = [sys.executable, "-m", "pd_serve.cli", "bench", "transfer"]
TINY = ("--size", "1MiB", "--block-sizes", "4KiB,64KiB", "--in-flight", "1,4", "--repeats", "2", "--warmup", "1")


def bench(*flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    environ |= {"COLUMNS": "160", "NO_COLOR": "1"}
    answer = nursery.run("pd_serve.cli", ["bench", "transfer", "--device", "host", *flags], environ, timeout_s=90)
    assert answer.returncode == status, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    return answer


# --- the command


def test_table_json_and_picture(tmp_path: Path) -> None:
    answer = bench(*TINY, "--transports", "nixl", "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png"))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["settings"]["size"] == 1 << 20 and result["settings"]["cuda"] is False
    assert result["failed"] == {} and result["load"] == []
    assert {(case["block_bytes"], case["scattered"], case["in_flight"]) for case in result["cases"]} == {
        (size, scattered, n) for size in (4096, 65536) for scattered in (False, True) for n in (1, 4)
    }
    for case in result["cases"]:
        assert case["lane"] == "nixl" and case["size_bytes"] == 1 << 20
        assert len(case["seconds"]) == 2 and 0 < case["host_s"] <= case["median_s"]
        assert case["gb_per_s"] == pytest.approx(case["size_bytes"] / case["median_s"] / 1e9)
        assert isinstance(case["descriptors"], int)
    assert {limit["name"] for limit in result["limits"] if limit["gb_per_s"] > 0} == {"memcpy", "nixl"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "a.png").stat().st_size > 5_000
    assert "scattered x4" in answer.stdout and "64KiB" in answer.stdout and "limit, memcpy" in answer.stdout


def test_other_parallelism_and_block_size_are_verified_too(tmp_path: Path) -> None:
    other = ("--tp", "2:1", "--source-block-tokens", "16", "--reader-block-tokens", "64")
    bench(*TINY, *other, "--transports", "nixl", "--json", str(tmp_path / "a.json"))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["failed"] == {} and len(result["cases"]) == 8
    assert {case["size_bytes"] for case in result["cases"]} == {1 << 20}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--transports", "pigeon"), "--transports: there is no 'pigeon'; known: nvlink, nixl, ucx"),
        (("--block-sizes", "5000"), "--block-sizes: 5000 is no block of 8 heads of 16 tokens"),
        (("--size", "1KiB"), "smaller than the largest of --block-sizes"),
        (("--tp", "3:2"), "one of the two must divide the other"),
        (("--tp", "two"), "--tp must be two numbers like 2:1"),
        (("--under-load", "yes"), "--under-load is about GPUs"),
        (("--transports", "nixl,nvlink"), "--transports nvlink is about GPUs"),
        (("--device", "cuda", "--devices", "0,1,2"), "--devices: give the source's GPU and the reader's"),
        (("--device", "cuda", "--devices", "98,99"), "--devices: GPU 99 is not there"),
    ],
)
def test_mistakes_are_found_before_anything_starts(flags: tuple[str, ...], message: str) -> None:
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(config.load("bench transfer", {"device": "host"} | given, environ={}))


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"--png needs matplotlib .*pip install 'pd-serve\[bench\]'"):
        plot.require_matplotlib()


def test_ctrl_c_leaves_no_process_and_nothing_in_shared_memory() -> None:
    before = set(Path("/dev/shm").iterdir())
    process = psutil.Popen(
        [*COMMAND, "--device", "host", "--transports", "nixl", "--repeats", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while len(children := process.children(recursive=True)) < 2:  # a reader and its source
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not psutil.wait_procs(children, timeout=5)[1]
    left = {path for path in set(Path("/dev/shm").iterdir()) - before if f"{process.pid}" in path.name}
    assert not left


def test_killing_the_command_takes_its_processes_along(tmp_path: Path) -> None:
    environ = os.environ | {"TMPDIR": str(tmp_path)}  # what it cannot remove any more
    command = [*COMMAND, "--device", "host", "--transports", "nixl"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, env=environ)
    deadline = time.monotonic() + 30
    while len(children := process.children(recursive=True)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait(5)
    assert not psutil.wait_procs(children, timeout=5)[1]


# --- arithmetic


def test_a_block_of_two_mebibytes_is_llama_3_1_8b() -> None:
    _, layout = layouts(Job("nixl", False, block_sizes=(4096, 2 << 20)))
    assert layout.block_shape(1) == (32, 2, 8, 16, 128)
    assert [layout.block_bytes(group) for group in range(2)] == [4096, 2 << 20]


@pytest.mark.parametrize(
    ("tp", "tokens", "sources"),
    [((1, 1), (16, 16), 1), ((2, 1), (16, 64), 2), ((1, 2), (64, 16), 1), ((4, 2), (16, 16), 2)],
)
def test_every_source_has_its_share_of_each_piece(tp: tuple[int, int], tokens: tuple[int, int], sources: int) -> None:
    job = Job("nixl", False, size_bytes=1 << 20, block_sizes=(8192, 65536), tp=tp, tokens=tokens)
    ranks, reader = layouts(job)
    assert len(ranks) == sources
    for group, size in enumerate(job.block_sizes):
        found = [slicings(rank, reader)[group] for rank in ranks]
        assert sum(slicing.piece_bytes for slicing in found) == size
        pieces = {
            num_blocks(job, rank)[group] * s.source.pieces_per_block for rank, s in zip(ranks, found, strict=True)
        }
        assert pieces == {num_blocks(job, reader)[group] * found[0].reader.pieces_per_block} == {(1 << 20) // size}


def test_cases_fit_into_the_bytes_of_a_pull() -> None:
    job = Job("nixl", False, size_bytes=4 << 20, block_sizes=(4096, 2 << 20), in_flight=(1, 16))
    assert {(case.group, case.in_flight) for case in cases(job)} == {(0, 1), (0, 16), (1, 1)}
    assert [case.scattered for case in cases(Job("nixl", False))] == [False, True]  # a self-test


def test_scattered_blocks_keep_the_order_of_their_pieces() -> None:
    order = np.random.default_rng(0)
    table = _table(8, 4, True, order)
    assert sorted(table.tolist()) == list(range(32))
    assert (np.diff(table.reshape(8, 4), axis=1) == 1).all()
    assert _table(3, 2, False, order).tolist() == list(range(6))


@pytest.mark.parametrize("tokens", [(16, 16), (16, 64), (64, 16)])
def test_wrong_bytes_are_found(tokens: tuple[int, int]) -> None:
    job = Job("nixl", False, size_bytes=64 << 10, block_sizes=(4096,), tp=(2, 1), tokens=tokens)
    (source_layout, *_), reader_layout = layouts(job)
    source = HostPool(source_layout, num_blocks(job, source_layout)).tensors()[0]
    reader = HostPool(reader_layout, num_blocks(job, reader_layout)).tensors()[0]
    content.fill(source, seed=5)
    views = [content.pieces(reader, reader_layout, 0, 16), content.pieces(source, source_layout, 0, 16)]
    heads = content.shared_heads(source_layout, reader_layout, 0)
    order = np.random.default_rng(0).permutation(16)
    local = np.arange(16)
    assert not content.equal(views[0], local, views[1], order, heads)
    for ours, theirs in zip(local, order, strict=True):
        parts = [view.shape[1] for view in views]
        target = views[0][ours // parts[0], ours % parts[0]]
        target[:, :, heads[0]] = views[1][theirs // parts[1], theirs % parts[1]][:, :, heads[1]]
    assert content.equal(views[0], local, views[1], order, heads)
    views[0][-1, -1, 0, 0, 0, 0, 0] += 1
    assert not content.equal(views[0], local, views[1], order, heads)


def test_content_depends_on_the_seed_and_on_the_place() -> None:
    a, b, c = (torch.zeros(4096, dtype=torch.uint8) for _ in range(3))
    content.fill(a, 1)
    content.fill(b, 1)
    content.fill(c, 2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len(a.view(torch.int32).unique()) == 1024


def result(**other: Any) -> dict[str, Any]:
    case = {"lane": "nvlink", "block_bytes": 32768, "scattered": True, "in_flight": 1, "gb_per_s": 370.0}
    settings = {"cuda": True, "memory": "cumem", "devices": (0, 1), "size": 1 << 28, "repeats": 5, "tp": (1, 1)}
    settings |= {"source_block_tokens": 16, "reader_block_tokens": 16}
    limits = [{"name": "memcpy", "gb_per_s": 395.0}, {"name": "nixl", "gb_per_s": None, "why": "no NIXL"}]
    return {"settings": settings, "cases": [case], "limits": limits, "load": [], "failed": {"ucx": "absent"}} | other


def test_shares_are_of_the_fastest_limit(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    assert report.limit_gb_per_s(result()) == 395.0
    load = {"lane": "nvlink", "batch": 32, "block_bytes": 2 << 20, "alone_ms": 0.4, "loaded_ms": 0.42}
    load |= {"slowdown": 1.05, "gb_per_s": 360.0}
    console = Console(width=120)
    console.print(report.table(result()), report.load_table(result(load=[load])))
    text = capsys.readouterr().out
    assert "94%" in text and "x1.050" in text
    assert report.title(result()) == "GB/s, cumem memory of cuda:0 to cuda:1, 256MiB a pull, median of 5"
    assert report.lines(result())[1:] == [
        "limit, contiguous NIXL READ: not measured: no NIXL",
        "percentages are of the fastest limit",
        "ucx: absent",
    ]
    assert math.isclose(report.limit_gb_per_s(result(limits=[])), 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    flags = ("--device", "cuda", "--size", "64MiB", "--block-sizes", "32KiB,2MiB", "--under-load")
    bench(*flags, "--transports", "nvlink", "--json", str(tmp_path / "a.json"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert {case["lane"] for case in found["cases"]} == {"nvlink"} and len(found["load"]) == 6
