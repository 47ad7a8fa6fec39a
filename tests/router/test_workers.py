"""Several router processes on one port: one router to clients, operators and nodes, whichever of them is asked."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pd_serve.node.registration import Registration
from pd_serve.router.siblings import joined_metrics
from tests import nursery
from tests.router.conftest import StartNode, until
from tests.router.scripted_node import ScriptedNode

pytestmark = pytest.mark.slow

SECRET = "a secret of more than sixteen bytes"


class Front:
    """``pd-serve router --workers 2`` and a decode node that registers with it."""

    def __init__(self, node: ScriptedNode, log: Path) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--workers", "2", "--min-prefill", "0", "--port", str(self.port)]
        environ = {**os.environ, "PD_SERVE_SECRET": SECRET}
        self.process = nursery.start("pd_serve.cli", ["router", *options], log, environ)
        self.registration = Registration(
            [self.url], node.url, asyncio.Event(), lambda: len(node._connections), timeout_s=2, secret=SECRET.encode()
        )

    async def get(self, path: str) -> httpx.Response | None:
        """Over a new connection: of any of them."""
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            try:
                return await client.get(self.url + path)
            except httpx.HTTPError:
                return None

    async def status(self) -> dict[str, Any]:
        answer = await self.get("/v1/status")
        assert answer is not None
        return dict(answer.json())

    async def is_ready(self) -> bool:
        answer = await self.get("/ready")
        return answer is not None and answer.status_code == 200

    async def stream(self, max_tokens: int, seen: list[str]) -> None:
        body = {"model": "tiny", "prompt": "the fox", "max_tokens": max_tokens, "stream": True}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=20) as client,
            client.stream("POST", self.url + "/v1/completions", json=body) as answer,
        ):
            async for line in answer.aiter_lines():
                if line:
                    seen.append(line)

    async def spread(self, tokens: int) -> list[tuple[asyncio.Task[None], list[str]]]:
        """Streams, until each process has some: the kernel deals connections out by chance."""
        streams: list[tuple[asyncio.Task[None], list[str]]] = []
        while len(streams) < 40:
            seen: list[str] = []
            streams.append((asyncio.create_task(self.stream(tokens, seen)), seen))
            await until(lambda seen=seen: seen, "a token")  # type: ignore[misc]
            if all(worker["sequences"] for worker in (await self.status())["workers"]):
                return streams
        raise AssertionError("one of two processes got all of 40 connections")


@pytest.fixture
async def node(start_node: StartNode) -> ScriptedNode:
    return await start_node("decode", token_s=0.02, secret=SECRET)


@pytest.fixture
async def front(node: ScriptedNode, tmp_path: Path) -> AsyncIterator[Front]:
    front = Front(node, tmp_path / "log")
    try:
        await until(front.is_ready, "ready", 30)
        yield front
    finally:
        front.registration.stop()
        front.process.kill()
        front.process.wait()


async def test_they_are_one_router(front: Front, node: ScriptedNode) -> None:
    # one of them took the registration, both are linked
    assert len(node._connections) == 2
    streams = await front.spread(100)
    status = await front.status()
    assert status["sequences"] == status["in_flight"]["tiny"] == status["nodes"][0]["in_flight"] == len(streams)
    pids = {worker["pid"] for worker in status["workers"]}
    assert len(pids) == 2 and front.process.pid not in pids
    answer = await front.get("/metrics")
    assert answer is not None
    lines = [line for line in answer.text.splitlines() if line.startswith("pd_serve_requests_in_flight{")]
    assert len(lines) == 2 and sum(float(line.split()[-1]) for line in lines) == len(streams)
    assert answer.text.count('pd_serve_nodes{role="decode",state="ready"} 1.0') == 1

    # one dies: its streams alone are lost, and another one takes its place, which knows the node
    victim = status["workers"][0]
    os.kill(victim["pid"], signal.SIGKILL)
    ends = await asyncio.gather(*(task for task, _ in streams), return_exceptions=True)
    whole = [seen[-1] == "data: [DONE]" and len(seen) == 101 for _, seen in streams]
    assert whole.count(False) == victim["sequences"] == sum(isinstance(end, httpx.HTTPError) for end in ends)
    await until(front.is_ready, "ready again", 20)
    assert len(node._connections) == 2
    assert {worker["pid"] for worker in (await front.status())["workers"]} == pids - {victim["pid"]} | {
        worker["pid"] for worker in (await front.status())["workers"] if worker["worker"] == victim["worker"]
    }

    # a node that leaves is gone from both
    await front.registration.leave()
    await until(lambda: not node._connections, "unlinked")


async def test_a_signal_lets_all_streams_finish(front: Front) -> None:
    streams = await front.spread(60)
    front.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*(task for task, _ in streams))
    assert all(seen[-1] == "data: [DONE]" and len(seen) == 61 for _, seen in streams)
    status = await asyncio.to_thread(front.process.wait, 10)
    assert status == 0 and "Traceback" not in front.log.read_text(), front.log.read_text()


async def test_what_cannot_start_ends_the_whole() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ["--workers", "2", "--port", str(taken.getsockname()[1])]
        ended = await asyncio.to_thread(nursery.run, "pd_serve.cli", ["router", *options], timeout_s=30)
    assert ended.returncode == 2 and "cannot listen" in ended.stderr


def test_metrics_of_requests_have_a_worker_and_those_of_nodes_are_there_once() -> None:
    text = (
        "# HELP pd_serve_requests_total Requests\n# TYPE pd_serve_requests_total counter\n"
        'pd_serve_requests_total{status="200"} 3.0\n'
        "# HELP pd_serve_nodes Nodes\n# TYPE pd_serve_nodes gauge\n"
        'pd_serve_nodes{role="decode"} 1.0\n'
    )
    found = joined_metrics({0: text, 1: text, 2: None}, 1).decode()
    assert found.count("pd_serve_nodes{") == 1 and found.count("# TYPE pd_serve_requests_total counter") == 1
    for worker in (0, 1):
        assert f'pd_serve_requests_total{{status="200",worker="{worker}"}} 3.0' in found
