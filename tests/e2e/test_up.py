"""``pd-serve up`` as a newcomer runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import HTTP, children, wait_for
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def start(log: Path, *flags: str) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    with log.open("wb") as out:
        args = [sys.executable, "-m", "pd_serve.cli", "up", "--port", str(port), "--dtype", "float32"]
        args += ["--device", "cpu", *flags]
        # a session of its own, so that the test can send Ctrl-C to the whole terminal group
        return subprocess.Popen(args, stdout=out, stderr=out, start_new_session=True), port


def ready(port: int) -> bool:
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class Up:
    process: subprocess.Popen[bytes]
    port: int
    log: Path


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Up]:
    """As a newcomer's, with the default model. What ends it comes last."""
    log = tmp_path_factory.mktemp("up") / "up.log"
    process, port = start(log)
    try:
        wait_for(lambda: ready(port) and "curl" in log.read_text(), 90, "ready")
        yield Up(process, port, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_up_prints_what_to_type(up: Up) -> None:
    shown = up.log.read_text()
    assert f"http://127.0.0.1:{up.port}" in shown
    assert "prefill" in shown and "decode" in shown and "nixl" in shown
    command = re.search(r"curl .*?(?=\n\n|\Z)", shown, re.S)
    assert command is not None
    answer = subprocess.run(["bash", "-c", command.group(0)], capture_output=True, text=True, timeout=60, check=True)
    assert '"choices"' in answer.stdout
    assert f"at http://127.0.0.1:{up.port}/v1" in shown and "openai.OpenAI(base_url=" in shown


def test_a_child_that_dies_is_started_again(up: Up) -> None:
    nodes = HTTP.get(f"http://127.0.0.1:{up.port}/v1/status", timeout=5).json()["nodes"]
    decode = next(n for n in nodes if n["role"] == "decode")
    port = int(decode["url"].rsplit(":", 1)[1])
    owner = next(p for p in children(up.process.pid) if f":{port} " in listening(p))
    os.kill(owner, signal.SIGKILL)
    wait_for(lambda: not ready(up.port), 20, "not ready")
    wait_for(lambda: ready(up.port), 60, "ready again")


def listening(pid: int) -> str:
    import psutil

    return " ".join(f":{c.laddr.port}" for c in psutil.Process(pid).net_connections() if c.status == "LISTEN") + " "


def test_ctrl_c_ends_everything(up: Up) -> None:
    family = children(up.process.pid)
    assert len(family) >= 5  # router, two nodes, two engines
    body = '{"prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
    url = f"http://127.0.0.1:{up.port}/v1/completions"
    stream = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", body]
    streaming = subprocess.Popen(stream, stdout=subprocess.PIPE, text=True)
    assert streaming.stdout is not None and streaming.stdout.readline().startswith("data: ")
    started = time.monotonic()
    os.killpg(up.process.pid, signal.SIGINT)
    assert up.process.wait(10) in (0, 130)
    assert time.monotonic() - started < 9  # engines of a busy machine take seconds to give memory back
    assert '"shutting_down"' in streaming.communicate(timeout=5)[0]  # not that nodes are missing
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 2, "all children gone")
    assert "Traceback" not in up.log.read_text()


def test_when_the_parent_is_killed_nothing_stays(tmp_path: Path, small_model: Path) -> None:
    process, port = start(tmp_path / "up.log", "--model", str(small_model))
    wait_for(lambda: ready(port), 90, "ready")
    family = children(process.pid)
    process.kill()
    process.wait(10)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10, "orphans gone")


def test_a_taken_port_is_a_clear_error(smollm2: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        args = [sys.executable, "-m", "pd_serve.cli", "up", "--port", port]
        answer = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode != 0
    assert port in answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr + answer.stdout
