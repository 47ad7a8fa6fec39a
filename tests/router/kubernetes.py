"""A small API server: EndpointSlices that are listed and watched, as Kubernetes answers (plain HTTP, one namespace)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def endpoint_slice(name: str, *addresses: str, port: int, labels: dict[str, str], **conditions: bool) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "models", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "metrics", "port": 1}, {"name": "http", "port": port}],
        "endpoints": [{"addresses": [one], "conditions": {"ready": True, **conditions}} for one in addresses],
    }


class ApiServer:
    def __init__(self, token: str) -> None:
        self._token = token
        self._version = 100
        self._slices: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._news = asyncio.Event()
        self.oldest = 0  # what was before has been forgotten
        self.lists = self.watches = 0
        self.broken = False

    def put(self, item: dict[str, Any]) -> None:
        kind = "MODIFIED" if item["metadata"]["name"] in self._slices else "ADDED"
        self._slices[item["metadata"]["name"]] = item
        self._event(kind, item)

    def delete(self, name: str) -> None:
        self._event("DELETED", self._slices.pop(name))

    def forget(self) -> None:
        """All watches end, and none goes on from where it was."""
        self._version += 1
        self.oldest = self._version
        self._stir()

    def _event(self, kind: str, item: dict[str, Any]) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, json.loads(json.dumps({"type": kind, "object": item}))))
        self._stir()

    def _stir(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _answer(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self._token}":
            return JSONResponse({"kind": "Status", "code": 401, "message": "Unauthorized"}, 401)
        if self.broken:
            return JSONResponse({"kind": "Status", "code": 500, "message": "etcd is away"}, 500)
        key, _, value = request.query_params["labelSelector"].partition("=")
        if "watch" in request.query_params:
            self.watches += 1
            since = int(request.query_params["resourceVersion"])
            return StreamingResponse(self._watch(since, key, value), media_type="application/json")
        self.lists += 1
        items = [item for item in self._slices.values() if item["metadata"]["labels"].get(key) == value]
        return JSONResponse(
            {"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(self._version)}, "items": items}
        )

    async def _watch(self, since: int, key: str, value: str) -> AsyncIterator[str]:
        while True:
            news = self._news
            if since < self.oldest:
                gone = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old"}
                yield json.dumps({"type": "ERROR", "object": gone}) + "\n"
                return
            for version, event in self._events:
                if version > since and event["object"]["metadata"]["labels"].get(key) == value:
                    yield json.dumps(event) + "\n"
            since = max(since, self._version)
            bookmark = {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(since)}}
            yield json.dumps({"type": "BOOKMARK", "object": bookmark}) + "\n"
            await news.wait()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its URL."""
        path = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"
        listener = socket.create_server(("127.0.0.1", 0))
        app = Starlette(routes=[Route(path, self._answer)])
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            self.forget()
            await task
