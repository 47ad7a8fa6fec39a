"""``pd-serve bench transfer``: a pair of processes for each transport, one after the other, and a report.

Called by the command line. Nothing that moves bytes is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from pd_serve import __version__
from pd_serve.bench.transfer import plot, report
from pd_serve.bench.transfer.job import LIMIT, Job, cases, layouts
from pd_serve.bench.transfer.start import run_reader
from pd_serve.config import BenchTransferConfig
from pd_serve.errors import ConfigError
from pd_serve.values import render_size

TRANSPORTS = ("nvlink", "nixl", "ucx")
_HOST_SIZE, _CUDA_SIZE = 64 << 20, 256 << 20
_LIMIT_BLOCK = 2 << 20
_STEADY_S = 20.0  # in so short a run the limit is measured once
_INTERRUPTED = 130


def run(config: BenchTransferConfig) -> int:
    """The exit status: 0 when something was measured and nothing that was asked for failed. Raises ConfigError."""
    unknown = [name for name in config.transports if name not in TRANSPORTS]
    if unknown:
        raise ConfigError(f"--transports: there is no {unknown[0]!r}; known: {', '.join(TRANSPORTS)}")
    if not config.block_sizes or not config.in_flight:
        raise ConfigError("--block-sizes and --in-flight need a number each")
    if config.png:
        plot.require_matplotlib()
    cuda, devices = _place(config)
    config = replace(config, size=config.size or (_CUDA_SIZE if cuda else _HOST_SIZE), devices=devices)
    for flag, given in (("--under-load", config.under_load), ("--transports nvlink", "nvlink" in config.transports)):
        if given and not cuda:
            raise ConfigError(f"{flag} is about GPUs: give --device cuda")
    if max(config.block_sizes) > config.size:
        raise ConfigError(f"--size {render_size(config.size)} is smaller than the largest of --block-sizes")
    bench = _Bench(config, cuda)
    layouts(bench.job("nixl"))  # a ConfigError now rather than in a child
    interrupted = False
    try:
        asyncio.run(bench.run())
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and not bench.result["cases"]:
        return _INTERRUPTED
    _print(bench.result)
    _write(bench.result, config)
    asked_and_failed = set(config.transports) & set(bench.result["failed"])
    if interrupted:
        return _INTERRUPTED
    return 0 if bench.result["cases"] and not asked_and_failed else 1


def _place(config: BenchTransferConfig) -> tuple[bool, tuple[int, int]]:
    """Whether pools are on GPUs, and on which. Raises ConfigError for GPUs that are not there."""
    devices = (config.devices * 2)[:2]  # one number is both
    if len(devices) < 2 or len(config.devices) > 2:
        raise ConfigError("--devices: give the source's GPU and the reader's, such as 0,1")
    if config.device == "host":
        return False, (devices[0], devices[1])
    count, why = _gpus()
    if config.device == "auto":
        return count > max(devices), (devices[0], devices[1])
    if count <= max(devices):
        raise ConfigError(f"--devices: GPU {max(devices)} is not there, this machine has {count}{why}")
    return True, (devices[0], devices[1])


def _gpus() -> tuple[int, str]:
    """How many there are, and why there are none."""
    from pd_serve.memory.cuda_driver import CudaDriver, reason
    from pd_serve.memory.driver import DriverError

    try:
        return CudaDriver().device_count(), ""
    except DriverError as error:
        return 0, f" ({reason(error)})"


class _Bench:
    """A run and what it has found so far."""

    def __init__(self, config: BenchTransferConfig, cuda: bool) -> None:
        self._config = config
        self._cuda = cuda
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("json", "png")}
        self.result: dict[str, Any] = {
            "version": __version__,
            "machine": {"system": platform.platform(), "python": platform.python_version()},
            "settings": settings | {"cuda": cuda},
            "limits": [],
            "cases": [],
            "load": [],
            "failed": {},  # transport -> why
        }

    def job(self, lane: str) -> Job:
        config = self._config
        common = Job(
            lane,
            self._cuda,
            (config.devices[0], config.devices[1]),
            size_bytes=config.size,
            repeats=config.repeats,
            warmup=config.warmup,
        )
        if lane == LIMIT:  # NIXL reads cudaMalloc memory over NVLink, and cumem memory not
            return msgspec.structs.replace(common, cumem=False, block_sizes=(min(_LIMIT_BLOCK, config.size),))
        return msgspec.structs.replace(
            common,
            cumem=config.memory == "cumem",
            block_sizes=tuple(sorted(set(config.block_sizes))),
            in_flight=tuple(sorted(set(config.in_flight))),
            tp=config.tp,
            tokens=(config.source_block_tokens, config.reader_block_tokens),
            under_load=config.under_load,
        )

    async def run(self) -> None:
        lanes = list(self._config.transports or TRANSPORTS)
        if not self._config.transports and not self._cuda:
            lanes.remove("nvlink")
        # the limit before and after: a machine that others use meanwhile is not the same all the time
        jobs = [self.job(LIMIT), *(self.job(lane) for lane in lanes), self.job(LIMIT)]
        start_s = time.monotonic()
        with _progress(sum(len(cases(job)) for job in jobs)) as (say, advance):
            for number, job in enumerate(jobs):
                if number == len(jobs) - 1 and time.monotonic() - start_s < _STEADY_S:
                    break
                say("the raw limit" if job.lane == LIMIT else job.lane)

                def take(record: dict[str, Any]) -> None:
                    if record["kind"] in ("case", "limit"):
                        advance()
                    self._take(record)

                outcome = await run_reader([job], take)
                if outcome.status != 0:
                    self._fail(job.lane, f"its processes ended: {outcome.why(0)}")

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        match kind:
            case "case":
                self.result["cases"].append(record)
            case "load":
                self.result["load"].append(record)
            case "limit":
                self._limit(record)
            case "failed":
                self._fail(record["lane"], record["message"])

    def _fail(self, lane: str, why: str) -> None:
        if lane == LIMIT:
            self._limit({"name": "nixl", "gb_per_s": None, "why": why})
        else:
            self.result["failed"].setdefault(lane, why)

    def _limit(self, record: dict[str, Any]) -> None:
        """Of several measurements the fastest counts."""
        limits = self.result["limits"]
        known = next((limit for limit in limits if limit["name"] == record["name"]), None)
        if known is None:
            limits.append(record)
        elif (record["gb_per_s"] or 0) > (known["gb_per_s"] or 0):
            limits[limits.index(known)] = record


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar on a terminal; drawn when a case ends, so that it takes nothing from the measurement."""
    if not sys.stderr.isatty():
        yield (lambda _text: None), (lambda: None)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("starting", total=total)

        def say(text: str) -> None:
            progress.update(bar, description=text, refresh=True)

        def advance() -> None:
            progress.advance(bar)
            progress.refresh()

        yield say, advance


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if result["cases"]:
        console.print(report.title(result) + "\n")
        console.print(report.table(result))
        console.print()
    if result["load"]:
        console.print(report.load_table(result))
        console.print()
    print("\n".join(report.lines(result)))


def _write(result: dict[str, Any], config: BenchTransferConfig) -> None:
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: cannot write {config.json}: {error.strerror}") from error
    if config.png and result["cases"]:
        plot.draw(result, Path(config.png))
