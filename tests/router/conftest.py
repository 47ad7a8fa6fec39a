"""A router on a free port and scripted nodes, all in the test's own event loop, all gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from pd_serve.config import RouterConfig
from pd_serve.http import bounded
from pd_serve.router.app import Router, create_app
from tests.router.scripted_node import Fabric, ScriptedNode

if TYPE_CHECKING:
    from pd_serve.otel import Tracing

StartNode = Callable[..., Awaitable[ScriptedNode]]
StartRouter = Callable[..., Awaitable["Running"]]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A router that serves HTTP."""

    def __init__(self, settings: RouterConfig, port: int = 0, tracing: Tracing | None = None) -> None:
        self.app = create_app(settings, tracing=tracing)
        self.router: Router = self.app.state.router
        listeners = [socket.create_server(("127.0.0.1", port))]
        self.url = f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
        if (admin := settings.admin_address()) is not None:
            listeners.append(socket.create_server(("127.0.0.1", admin[1])))
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, verify=False)
        config = uvicorn.Config(
            self.app, http=bounded(settings), ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=listeners))

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    async def started(self) -> None:
        await until(lambda: self._server.started, "the router serves")

    async def ready(self) -> Running:
        await until(self._is_ready, "ready")
        return self

    async def _is_ready(self) -> bool:
        return (await self.http.get("/ready")).status_code == 200

    async def complete(self, prompt: object = "the fox", max_tokens: int = 8, **body: object) -> dict[str, Any]:
        answer = await self.post(prompt=prompt, max_tokens=max_tokens, **body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def post(self, path: str = "/v1/completions", **body: object) -> httpx.Response:
        body = {"model": "tiny", "temperature": 0, **body}
        return await self.http.post(path, json=body)

    async def stop(self) -> None:
        """Idempotent."""
        await self.http.aclose()
        self._server.should_exit = True
        await self._task


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while True:
        seen = condition()
        if asyncio.iscoroutine(seen):
            seen = await seen
        if seen:
            return seen
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.005)


@pytest.fixture
async def start_node() -> AsyncIterator[StartNode]:
    fabric, nodes = Fabric(), []

    async def start(role: str, *, port: int = 0, **options: Any) -> ScriptedNode:
        node = await ScriptedNode(fabric, role, **options).start(port)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        await node.stop()


@pytest.fixture
async def start_router() -> AsyncIterator[StartRouter]:
    routers = []

    async def start(
        *nodes: ScriptedNode, ready: bool = True, listen_port: int = 0, tracing: Tracing | None = None, **options: Any
    ) -> Running:
        urls = {f"{role}": tuple(node.url for node in nodes if node.role == role) for role in ("prefill", "decode")}
        counts = {f"min_{role}": len(urls[f"{role}"]) for role in ("prefill", "decode")}
        running = Running(
            RouterConfig(**{**urls, **counts, "node_wait_s": 1.0, "link_timeout_s": 3.0, **options}),
            listen_port,
            tracing,
        )
        routers.append(running)
        await running.started()
        return await running.ready() if ready else running

    yield start
    for running in routers:
        await running.stop()


def idle(*nodes: ScriptedNode) -> Callable[[], bool]:
    return lambda: not any(node.running for node in nodes)
