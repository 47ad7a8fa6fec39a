"""Each lane measured between two processes of this machine: a pull of the region that nodes measure when they connect.

The two ends are those of ``bench transfer``. Which lane nodes would choose follows from the figures as it does when
they connect: the fastest.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pd_serve import records
from pd_serve.bench.transfer.job import Job
from pd_serve.bench.transfer.start import run_reader
from pd_serve.doctor.findings import Finding, broken, note, ok, problem

GPU_BYTES, GPU_BLOCK_BYTES = 256 << 20, 2 << 20  # of a pull between GPUs

# Below it a lane has probably fallen back to something that it should not use; see transfer/session/probe.py.
FLOOR_GB_PER_S = 1.0
NVLINK_FLOOR_GB_PER_S = 100.0
_AGAIN = "run it again with a longer --timeout-s, or while the machine does nothing else"


class Rate(msgspec.Struct, frozen=True):
    """What came of a lane: gigabytes a second, or why there is none."""

    lane: str
    gb_per_s: float | None
    why_not: str = ""
    too_late: bool = False  # nothing is known of it


class Place(msgspec.Struct, frozen=True):
    """Where the two ends keep their pools. ``devices``: of source and reader; None: host memory."""

    devices: tuple[int, int] | None = None
    cumem: bool = False
    nvlinked: bool = False  # GPUs of this machine read each other's memory over NVLink

    def __str__(self) -> str:
        if self.devices is None:
            return "between nodes of this machine, in host memory"
        return f"between cuda:{self.devices[0]} and cuda:{self.devices[1]}"


async def measure_all(lanes: list[str], place: Place, deadline_s: float) -> list[Rate]:
    """One pair of processes measures all lanes, since to start them takes longest; another, what it left undone when it
    crashed. Never raises."""
    found: dict[str, Rate] = {}
    left = lanes
    while left:
        timeout_s = deadline_s - time.monotonic()
        if timeout_s <= 0:
            return [found.get(lane) or Rate(lane, None, "no time was left for it", too_late=True) for lane in lanes]
        rates, outcome = await _measure(left, place, timeout_s)
        found |= rates
        left = [lane for lane in left if lane not in rates]
        if left:  # the first of them is where it hung or crashed
            found[left[0]] = Rate(left[0], None, outcome.why(timeout_s), too_late=outcome.timed_out)
            left = left[1:]
    return [found[lane] for lane in lanes]


async def _measure(lanes: list[str], place: Place, timeout_s: float) -> tuple[dict[str, Rate], records.Outcome]:
    """Of each lane that came to an end."""
    rates: dict[str, float] = {}
    ended: dict[str, Rate] = {}

    def take(record: dict[str, Any]) -> None:
        lane = record.get("lane", "")
        if record["kind"] == "case":
            rates[lane] = max(record["gb_per_s"], rates.get(lane, 0.0))
            ended[lane] = Rate(lane, rates[lane])
        elif record["kind"] == "failed":
            ended[lane] = Rate(lane, None, record["message"])

    outcome = await run_reader([_job(lane, place) for lane in lanes], take, timeout_s)
    return ended, outcome


def _job(lane: str, place: Place) -> Job:
    if place.devices is None:
        return Job(lane, False, repeats=9)
    # the probe region's 4 MiB take an NVLink less time than it takes to ask for them
    return Job(lane, True, place.devices, place.cumem, GPU_BYTES, (GPU_BLOCK_BYTES,))


def judge(rates: list[Rate], wanted: str, place: Place, *, busy: bool = False) -> list[Finding]:
    """``wanted``: the setting ``transport``. ``busy``: more threads wanted to run than there are cores."""
    best = max((rate.gb_per_s or 0.0 for rate in rates), default=0.0)
    return [*(_judge(rate, wanted, place, best, busy) for rate in rates), _choice(rates, wanted, place)]


def _judge(rate: Rate, wanted: str, place: Place, best: float, busy: bool) -> Finding:
    if rate.gb_per_s is None:
        if rate.too_late:
            return note(rate.lane, f"not measured: {rate.why_not}", _AGAIN)
        level = note if wanted in ("auto", rate.lane) else ok
        return level(rate.lane, f"cannot be used: {rate.why_not}")
    floor = NVLINK_FLOOR_GB_PER_S if rate.lane == "nvlink" and place.nvlinked else FLOOR_GB_PER_S
    if rate.gb_per_s >= floor:
        return ok(rate.lane, f"{rate.gb_per_s:.1f} GB/s")
    if place.devices is None and busy:  # cores copy there
        return note(rate.lane, f"{rate.gb_per_s:.2f} GB/s, on a machine whose cores are busy", _AGAIN)
    if rate.lane == "nvlink":
        fix = "end what else uses the GPUs; nvidia-smi nvlink -s and -e show links that are down or make errors"
    elif place.devices is not None:
        fix = (
            "its UCX cannot open this memory (cumem by file descriptor) and goes through the host: use the nvlink "
            "lane, fabric handles (IMEX), or a UCX that can"
        )
    else:
        fix = "see the UCX, RDMA and host sections for what it had to fall back to"
    text = f"{rate.gb_per_s:.2f} GB/s, far below what it should be"
    # a slow lane that no node would use is nothing to mend
    if wanted == "auto" and best >= 10 * rate.gb_per_s:
        return note(rate.lane, f"{text}; not used", fix)
    return problem(rate.lane, text, fix)


def _choice(rates: list[Rate], wanted: str, place: Place) -> Finding:
    name = "pd-serve would use"
    usable = {rate.lane: rate.gb_per_s for rate in rates if rate.gb_per_s is not None}
    late = {rate.lane for rate in rates if rate.too_late}
    if wanted in late or (late and wanted == "auto"):
        # nixl comes with pd-serve and is chosen where it works; which is faster is not known
        likely = wanted if wanted != "auto" else "nixl" if "nixl" in {*late, *usable} else min({*late, *usable})
        return note(name, f"{likely} {place}, probably: not all lanes were measured in time", _AGAIN)
    if wanted != "auto":
        if wanted in usable:
            better = max(usable, key=lambda lane: usable[lane])
            if usable[better] > 1.5 * usable[wanted]:
                fix = f"--transport auto, or {better}"
                return note(name, f"{wanted} {place}, as --transport says, though {better} is faster", fix)
            return ok(name, f"{wanted} {place}, as --transport says")
        return broken(name, f"{wanted}, as --transport says, and that does not work here", "--transport auto")
    # in host memory NIXL does the same with less work, and is chosen where it works (transfer/choice.py)
    if place.devices is None and "nixl" in usable:
        return ok(name, f"nixl {place}")
    if usable:
        best = max(usable, key=lambda lane: usable[lane])
        return ok(name, f"{best} {place}: the fastest of {', '.join(usable)}")
    return broken(name, "nothing: no lane works", "mend one of the lanes above; nixl needs no special hardware")
