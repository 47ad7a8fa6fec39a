"""The router as a process: quick to start, nothing heavy imported, ended by signals in an orderly way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.router.conftest import StartNode, until

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "numpy", "numba", "nixl", "httpx", "jinja2", "prometheus_client", "yaml")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, pd_serve.router.main, pd_serve.router.app, pd_serve.wire.model;"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


class Process:
    def __init__(self, *urls: tuple[str, str], **options: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        code = (
            "import sys, json; from pd_serve.config import RouterConfig; from pd_serve.router.main import run;"
            "d = json.loads(sys.argv[1]); d |= {role: tuple(d[role]) for role in ('prefill', 'decode')};"
            "sys.exit(run(RouterConfig(**d)))"
        )
        settings = {"port": self.port, **{r: [u for x, u in urls if x == r] for r in ("prefill", "decode")}, **options}
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(settings)], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )

    async def answers(self, path: str = "/health") -> bool:
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            try:
                return (await client.get(self.url + path, timeout=2)).status_code == 200
            except httpx.HTTPError:
                return False

    async def end(self, timeout_s: float = 10.0) -> tuple[int, str]:
        _, err = await asyncio.to_thread(self.process.communicate, timeout=timeout_s)
        return int(self.process.returncode), err.decode()


@pytest.fixture
async def process(start_node: StartNode, request: pytest.FixtureRequest) -> AsyncIterator[Process]:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.02)
    options: dict[str, object] = getattr(request, "param", {})
    process = Process((prefill.role, prefill.url), (decode.role, decode.url), **options)
    try:
        await until(lambda: process.answers("/ready"), "ready", 20)
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()


async def _stream(process: Process, max_tokens: int, seen: list[Any]) -> None:
    body = {"model": "tiny", "prompt": "the fox", "max_tokens": max_tokens, "stream": True}
    async with (
        httpx.AsyncClient(trust_env=False, verify=False, timeout=20) as client,
        client.stream("POST", process.url + "/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line:
                seen.append(line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_streams_finish(process: Process, number: int) -> None:
    seen: list[str] = []
    stream = asyncio.create_task(_stream(process, 60, seen))
    await until(lambda: len(seen) > 3, "tokens")
    os.kill(process.process.pid, number)
    await stream
    assert len(seen) == 61 and seen[-1] == "data: [DONE]"
    status, log = await process.end()
    assert status == 0 and "Traceback" not in log
    assert not await process.answers()


@pytest.mark.parametrize("process", [{"drain_delay_s": 0.6}], indirect=True)
async def test_who_stands_before_a_router_has_time_to_hear_that_it_leaves(process: Process) -> None:
    os.kill(process.process.pid, signal.SIGTERM)
    async with httpx.AsyncClient(trust_env=False, verify=False, base_url=process.url) as client:
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    seen: list[str] = []
    await _stream(process, 8, seen)  # asked for after the signal
    assert seen[-1] == "data: [DONE]"
    status, log = await process.end()
    assert status == 0 and "Traceback" not in log and "leaving" in log
    assert not await process.answers()


async def test_a_second_signal_ends_streams_in_words(process: Process) -> None:
    seen: list[str] = []
    stream = asyncio.create_task(_stream(process, 500, seen))
    await until(lambda: len(seen) > 3, "tokens")
    os.kill(process.process.pid, signal.SIGINT)
    await asyncio.sleep(0.4)
    os.kill(process.process.pid, signal.SIGINT)
    await stream
    assert json.loads(seen[-1][6:])["error"]["code"] == "shutting_down"
    status, log = await process.end()
    assert status == 0 and "Traceback" not in log


async def test_a_taken_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = (
            "from pd_serve.config import RouterConfig; from pd_serve.router.main import run;"
            f"run(RouterConfig(port={port}))"
        )
        answer = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
        )
    assert "ConfigError" in answer.stderr and str(port) in answer.stderr
