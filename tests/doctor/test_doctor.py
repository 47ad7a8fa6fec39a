"""The command as a process, and what becomes of checks that raise, hang or crash."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pd_serve import config, records
from pd_serve.bench.transfer import start
from pd_serve.doctor import run as doctor
from pd_serve.doctor import selftest
from pd_serve.doctor.findings import Finding, Level, Section, broken, note, ok
from pd_serve.doctor.machine import Machine
from pd_serve.doctor.report import as_json, show
from pd_serve.doctor.section import guarded
from pd_serve.doctor.selftest import Place, Rate, judge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

COMMAND = [sys.executable, "-m", "pd_serve.cli", "doctor"]


def environ(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    return clean | {"COLUMNS": "200", "NO_COLOR": "1"} | variables


def test_the_whole_as_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "DEADLINE_S", 60.0)  # on a busy machine nothing may be late here
    status = doctor.run(config.DoctorConfig(json=True))
    printed = capfd.readouterr()
    assert (status, printed.err) == (0, ""), printed.out
    result = json.loads(printed.out)
    assert result["broken"] is False and result["version"]
    sections = {section["name"]: section for section in result["sections"]}
    assert set(sections) == {*doctor.SECTIONS, "selftest"}
    for section in sections.values():
        for finding in section["findings"]:
            assert finding["level"] in ("ok", "note", "problem") and finding["what"] and finding["value"]
            assert finding["fix"] or finding["level"] != "problem", finding
            assert "could not be checked" not in finding["value"], finding
    assert sum(result["counts"].values()) == sum(len(section["findings"]) for section in sections.values())
    transports = {finding["what"]: finding["value"] for finding in sections["nixl"]["findings"]}["UCX transports"]
    assert "tcp" in transports
    lanes = {lane["lane"]: lane for lane in result["lanes"]}
    assert lanes["nixl"]["gb_per_s"] > 0, lanes
    assert any(finding["what"] == "pd-serve would use" for finding in sections["selftest"]["findings"])


def test_a_wrong_setting_is_a_finding_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PD_SERVE_KV_CACHE_MEMORY", "a lot")
    monkeypatch.setattr(doctor, "SECTIONS", {"software": "Software"})
    monkeypatch.setattr(doctor, "_ORDER", ("software",))
    assert doctor.run(config.DoctorConfig(self_test=False)) == 1
    printed = capfd.readouterr()
    assert "PD_SERVE_KV_CACHE_MEMORY must be a size" in printed.out and "cannot work here" in printed.out
    assert printed.err == ""


def test_a_check_that_raises_is_a_finding() -> None:
    def strange_check(machine: Machine) -> list[Finding]:
        raise ZeroDivisionError("oh")

    (found,) = guarded(strange_check, Machine())
    assert (found.level, found.what) == (Level.NOTE, "strange check")
    assert "ZeroDivisionError: oh" in found.value


async def test_a_section_that_hangs_or_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    run = records.run

    async def instead(arguments: list[str], *rest: Any, **options: Any) -> records.Outcome:
        return await run(["timeit", "-n1", "-r1", code], *rest, **options)

    monkeypatch.setattr(records, "run", instead)
    code = "import time; time.sleep(60)"
    section = await doctor._section("host", config.DoctorConfig(), {}, 1.0)
    slow = section.findings[-1]
    assert (slow.level, slow.value) == (Level.NOTE, "slow: no answer within 1 s") and "--timeout-s" in slow.fix
    code = "import os; os.abort()"
    section = await doctor._section("host", config.DoctorConfig(), {}, 1.0)
    assert "killed by SIGABRT" in section.findings[-1].value


def test_a_busy_machine_gives_all_longer_and_the_transport_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert doctor.busyness() == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0 * len(os.sched_getaffinity(0)), 0.0, 0.0))
    assert doctor.busyness() == 3
    late = [Rate(lane, None, "no time was left for it", too_late=True) for lane in ("nixl", "ucx")]
    choice = judge(late, "auto", Place())[-1]
    assert choice.level is Level.NOTE and choice.value.startswith("nixl ") and "--timeout-s" in choice.fix


async def test_records_are_told_from_noise() -> None:
    code = (
        "import os; from pd_serve import records; records.claim_stdout(); os.write(1, b'noise without an end');"
        "records.emit({'a': 1}); print('more'); records.emit({'b': [2]})"
    )
    found: list[dict[str, Any]] = []
    outcome = await records.run(["timeit", "-n1", "-r1", code], found.append)
    assert found == [{"a": 1}, {"b": [2]}]
    assert outcome.status == 0 and "noise without an end" in outcome.noise and "more" in outcome.noise


async def test_a_cancelled_run_leaves_no_process() -> None:
    others = set(psutil.Process().children())  # such as multiprocessing's resource tracker
    task = asyncio.create_task(records.run(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], lambda _: None))
    while not (children := set(psutil.Process().children()) - others):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_ctrl_c_ends_everything() -> None:
    process = psutil.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ(), text=True)
    deadline = time.monotonic() + 20
    while not (children := process.children(recursive=True)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    fine = Section("host", "Machine", [ok("a [b]", "1"), note("c", "2", "do this")], 0.1)
    show([fine, Section("empty", "Nothing", [], 0.0)])
    text = capsys.readouterr().out
    assert "a [b]" in text and "do this" in text and "0 problems, 1 note" in text and "Nothing" not in text
    bad = Section("nixl", "NIXL", [broken("NIXL", "gone", "pip install nixl")], 0.1)
    show([fine, bad])
    assert "pd-serve cannot work here as it is; 1 problem, 1 note" in capsys.readouterr().out
    data = as_json([fine, bad], [Rate("nixl", None, "gone")])
    assert data["broken"] and data["counts"] == {"ok": 1, "note": 1, "problem": 1}
    assert data["lanes"] == [{"lane": "nixl", "gb_per_s": None, "why_not": "gone", "too_late": False}]


_READER = """
import json, os, sys
from pd_serve import records
records.claim_stdout()
for job in json.load(sys.stdin):
    if job["lane"] == "ucx":
        os.abort()
    if job["lane"] == "slow":
        import time
        time.sleep(60)
    records.emit({"kind": "case", "lane": job["lane"], "gb_per_s": 2.0 + os.path.exists("again")})
    open("again", "w")
"""


def test_a_lane_that_crashes_or_hangs_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reader_that_crashes.py").write_text(_READER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "_READER", "reader_that_crashes")
    deadline_s = time.monotonic() + 5
    found = asyncio.run(selftest.measure_all(["nixl", "ucx", "nvlink", "slow", "later"], Place(), deadline_s))
    rates = {rate.lane: rate for rate in found}
    assert list(rates) == ["nixl", "ucx", "nvlink", "slow", "later"]
    assert (rates["nixl"].gb_per_s, rates["nvlink"].gb_per_s) == (2.0, 3.0)
    assert "SIGABRT" in rates["ucx"].why_not and not rates["ucx"].too_late
    assert rates["slow"].too_late and rates["later"].too_late
