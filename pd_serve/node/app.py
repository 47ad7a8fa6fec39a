"""The node's HTTP surface: health, status and metrics for operators; the model and the link for routers.

Made by the node's main loop. Starlette rather than FastAPI: five fixed routes need no schemas, and every
tenth of a second of a start counts.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from pd_serve.node.engine_process import EngineProcess
from pd_serve.node.links import TRY_AGAIN, Links
from pd_serve.wire.link import Hello


class NodeState(Protocol):
    """What the application asks of the node."""

    engine: EngineProcess
    links: Links
    draining: bool

    def hello(self) -> Hello | None:
        """How the node introduces itself to routers; None before its engine can serve."""

    def describe(self) -> dict[str, object]:
        """``GET /v1/status``."""

    def bundle(self) -> bytes | None:
        """``GET /model``: an encoded ModelBundle; None before the engine can serve. Reads files."""


def build(node: NodeState) -> Starlette:
    async def health(_: Request) -> Response:
        if node.engine.ready is None:
            return JSONResponse({"status": "starting"})
        if node.engine.answering():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine does not answer"}, status_code=503)

    async def ready(_: Request) -> Response:
        if node.draining:
            return JSONResponse({"ready": False, "reason": "draining"}, status_code=503)
        if not node.engine.answering():
            reason = "starting" if node.engine.ready is None else "the engine does not answer"
            return JSONResponse({"ready": False, "reason": reason}, status_code=503)
        return JSONResponse({"ready": True})

    async def status(_: Request) -> Response:
        return JSONResponse(node.describe())

    async def metrics(_: Request) -> Response:
        from pd_serve.node.metrics import render  # 50 ms that the start need not pay

        body = render(node.engine.status, node.engine.ready, links=len(node.links), draining=node.draining)
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def model(_: Request) -> Response:
        body = await asyncio.to_thread(node.bundle)
        if body is None:
            return JSONResponse({"error": "starting"}, status_code=503, headers={"Retry-After": "1"})
        return Response(body, media_type="application/msgpack")

    async def link(websocket: WebSocket) -> None:
        hello = node.hello()
        if hello is None:
            await websocket.accept()
            await websocket.close(TRY_AGAIN, "starting")
            return
        await node.links.serve(websocket, hello, node.engine)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/v1/status", status),
            Route("/model", model),
            WebSocketRoute("/link", link),
        ]
    )
