"""What ``up`` does with one process: its output, its deaths, its end. With real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from pd_serve import supervised
from pd_serve.errors import PDServeError
from pd_serve.processes import Child, describe_exit
from pd_serve.supervised import Supervised

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


class Script(Supervised):
    """A process that runs a line of Python instead of a command of ours."""

    def __init__(self, code: str) -> None:
        super().__init__("node-0", "decode", "http://127.0.0.1:1", Path("/none"))
        self._command = [sys.executable, "-u", "-c", code]


async def test_a_failure_to_start_is_told_in_its_own_words() -> None:
    process = Script("import sys; print('INFO noise'); print('pd-serve: the pool is too small'); sys.exit(2)")
    process.start()
    with pytest.raises(PDServeError, match=r"^node-0 did not start: the pool is too small$"):
        await process.keep_running()


async def test_a_failure_without_words_shows_the_last_output() -> None:
    process = Script("print('a'); raise ValueError('b')")
    process.start()
    with pytest.raises(PDServeError, match=r"(?s)^node-0 did not start: exit status 1\n  a\n.*ValueError: b$"):
        await process.keep_running()


async def test_it_is_started_again_but_not_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(supervised, "_BACKOFF_S", (0.01,) * supervised.MAX_RESTARTS)
    starts = tmp_path / "starts"
    process = Script(f"import sys; open({str(starts)!r}, 'a').write('x'); sys.exit(3)")
    process.has_served = True
    process.start()
    with pytest.raises(PDServeError, match="node-0 died 6 times within a minute: exit status 3"):
        await process.keep_running()
    assert starts.read_text() == "x" * 6


async def test_killed_while_starting_is_no_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "_BACKOFF_S", (0.01,) * supervised.MAX_RESTARTS)
    process = Script("import time; time.sleep(60)")
    process.start()
    first = process.pid
    keeping = asyncio.create_task(process.keep_running())
    os.kill(first, signal.SIGKILL)
    while process.pid == first:
        await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()
    await process.stop(5)


async def test_output_is_kept_until_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    process = Script("print('x INFO y early'); print('x WARNING y early'); input(); ")
    process.start()
    await asyncio.sleep(0.5)
    assert capfd.readouterr().err == ""
    process.stream()
    assert capfd.readouterr().err == "node-0     x WARNING y early\n"
    await process.stop(5)
    chatty = Script("import time\nwhile True: print('line', flush=True); time.sleep(0.01)")
    chatty.start(verbose=True)
    await asyncio.sleep(0.5)
    assert "node-0     line\n" in capfd.readouterr().err
    await chatty.stop(5)


async def test_who_does_not_end_is_killed() -> None:
    process = Script("import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf'); time.sleep(60)")
    process.start()
    while not process._kept:
        await asyncio.sleep(0.01)
    started_s = time.monotonic()
    await process.stop(0.3)
    assert 0.3 <= time.monotonic() - started_s < 2
    assert not psutil.pid_exists(process.pid)


async def test_settings_of_up_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_PORT", "1")
    monkeypatch.setenv("PD_SERVE_CACHE", "/cache")
    process = Script("import os; print('pd-serve:', sorted(n for n in os.environ if 'PD_SERVE' in n)); exit(1)")
    process.start()
    with pytest.raises(PDServeError, match=r"\['PD_SERVE_CACHE'\]"):
        await process.keep_running()


async def test_a_child_reads_its_input_and_has_a_session_of_its_own() -> None:
    code = "import os, sys; sys.exit(sys.stdin.read() == 'hello' and os.getsid(0) == os.getpid())"
    child = Child([sys.executable, "-c", code], stdin=b"hello")
    assert await child.wait() == 1
    assert child.returncode() == 1
    child.send_signal(signal.SIGTERM)  # too late, and no error


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import sys, time; from pd_serve.processes import Child\n"
        "child = Child([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = psutil.Popen([sys.executable, "-c", code], stdout=-1, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait(5)
    deadline_s = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-99) == "killed by signal 99"
