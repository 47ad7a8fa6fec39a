"""``pd-serve doctor``: runs all sections, each in a process with a time-out, then the self-test, and reports.

Called by the command line. Everything that could hang or crash happens in children, so this always ends, in time and
without a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from pd_serve import config as settings
from pd_serve import records
from pd_serve.config import DoctorConfig
from pd_serve.doctor import report, selftest
from pd_serve.doctor.findings import Finding, Section, note, problem
from pd_serve.errors import ConfigError

DEADLINE_S = 15.0  # of all on an idle machine; then what is missing is said to be missing
SECTION_TIMEOUT_S = 8.0
_BUSY = 2.0  # from here on a slow copy in host memory says nothing
_MOST_BUSY = 6.0  # times the deadline of an idle machine
_INTERRUPTED = 130

SECTIONS = {
    "gpu": "GPUs and device memory",
    "nvlink": "NVLink",
    "rdma": "RDMA",
    "nixl": "NIXL",
    "ucx": "ucxx",
    "software": "Software and settings",
    "host": "Machine and container",
}
_ORDER = ("software", "host", "gpu", "nvlink", "rdma", "nixl", "ucx")  # of the report


@dataclass(frozen=True)
class Result:
    sections: list[Section]
    rates: list[selftest.Rate]


def run(config: DoctorConfig) -> int:
    """The exit status: 1 when something is broken that pd-serve cannot do without."""
    try:
        result = asyncio.run(_examine(config))
    except KeyboardInterrupt:
        return _INTERRUPTED
    if config.json:
        print(json.dumps(report.as_json(result.sections, result.rates), indent=1))
    else:
        report.show(result.sections)
    return 1 if any(finding.broken for section in result.sections for finding in section.findings) else 0


async def _examine(config: DoctorConfig) -> Result:
    longest_s = config.timeout_s or DEADLINE_S * busyness()
    section_s = max(SECTION_TIMEOUT_S, longest_s / 2)
    deadline_s = time.monotonic() + longest_s
    facts: dict[str, Any] = {}
    sections: dict[str, Section] = {}
    # loading libraries is what takes time, and that takes cores
    turns = asyncio.Semaphore(max(2, len(os.sched_getaffinity(0)) // 2))
    with _progress(len(SECTIONS) + config.self_test) as (begin, end):

        async def one(name: str) -> None:
            async with turns:
                begin(SECTIONS[name])
                sections[name] = await _section(name, config, facts, section_s)
                end()

        await asyncio.gather(*(one(name) for name in SECTIONS))
        ordered = [sections[name] for name in _ORDER]
        if not config.self_test:
            return Result(ordered, [])
        start_s = time.monotonic()
        begin("Self-test")
        place = _place(facts)
        lanes = ["nixl", "ucx"] if place.devices is None else ["nvlink", "nixl", "ucx"]
        rates = await selftest.measure_all(lanes, place, deadline_s)
        end()
    found = selftest.judge(rates, _wanted(), place, busy=busyness() > _BUSY)
    ordered.append(Section("selftest", f"Self-test, {place}", found, time.monotonic() - start_s))
    return Result(ordered, rates)


def busyness() -> float:
    """How many times longer work takes than on an idle machine: runnable threads for each core, by the last minute."""
    return min(_MOST_BUSY, max(1.0, 1.0 + os.getloadavg()[0] / len(os.sched_getaffinity(0))))


async def _section(name: str, config: DoctorConfig, facts: dict[str, Any], timeout_s: float) -> Section:
    findings: list[Finding] = []
    start_s = time.monotonic()

    def take(record: dict[str, Any]) -> None:
        facts.update(record.get("facts", {}))
        findings.extend(msgspec.convert(record.get("findings", []), list[Finding]))

    outcome = await records.run(
        ["pd_serve.doctor.section", name], take, stdin=msgspec.json.encode(config), timeout_s=timeout_s
    )
    if outcome.timed_out:
        fix = "give it longer (--timeout-s); if it never ends on an idle machine, a driver or library hangs: see dmesg"
        findings.append(note("the rest of this section", f"slow: {outcome.why(timeout_s)}", fix))
    elif outcome.status != 0:
        fix = "a driver or library crashes: look into dmesg, and update it"
        findings.append(problem("the rest of this section", outcome.why(timeout_s), fix))
    return Section(name, SECTIONS[name], findings, time.monotonic() - start_s)


def _place(facts: dict[str, Any]) -> selftest.Place:
    count = facts.get("gpus", 0)
    if not count:
        return selftest.Place()
    return selftest.Place((0, min(1, count - 1)), bool(facts.get("cumem")), bool(facts.get("nvlinked")))


def _wanted() -> str:
    """The transport that nodes of this environment are told to use; a wrong setting is a finding elsewhere."""
    try:
        return str(settings.load("decode", {}).transport)
    except ConfigError:
        return "auto"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """``(begin(title), end())``: what is being looked at, on a terminal."""
    if not sys.stderr.isatty():
        yield (lambda _title: None), (lambda: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        yield (lambda title: progress.update(bar, description=title)), (lambda: progress.advance(bar))
