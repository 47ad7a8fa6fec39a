"""The node's HTTP surface: health, status, metrics, sleep and role for operators; the link for routers.

Made by the node's main loop. Starlette rather than FastAPI: a few fixed routes need no schemas, and every
tenth of a second of a start counts.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from pd_serve.node import role
from pd_serve.node.engine_process import EngineProcess
from pd_serve.node.links import Links
from pd_serve.node.role import Switch
from pd_serve.node.sleep import LEVELS, TAGS, Document, Refused, Sleep
from pd_serve.trust import asks_for_others
from pd_serve.wire.link import ROLES, Hello


class NodeState(Protocol):
    """What the application asks of the node."""

    engine: EngineProcess
    links: Links
    sleep: Sleep | None  # None: not enabled
    switch: Switch
    draining: bool
    order_token: str  # what orders must show; empty: nothing

    def hello(self) -> Hello | None:
        """How the node introduces itself to routers; None while it takes no requests (see ``why_not``)."""

    def why_not(self) -> str:
        """Why the node takes no requests now; empty when it does."""

    def describe(self) -> dict[str, object]:
        """``GET /v1/status``."""


def build(node: NodeState) -> Starlette:
    pages = _Pages(node)

    def order(carry_out: _Order, *, is_question: bool = False) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                if not is_question:
                    _check_sender(node.order_token, request)
                _check_state(node)
                document = await carry_out(node, request)
            except Refused as error:
                headers = {"Retry-After": "1"} if error.status == 503 else None
                return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)
            return JSONResponse(msgspec.to_builtins(document))

        return answer

    return Starlette(
        routes=[
            Route("/health", pages.health),
            Route("/ready", pages.ready),
            Route("/metrics", pages.metrics),
            Route("/v1/status", pages.status),
            Route("/sleep", order(_fall_asleep), methods=["POST"]),
            Route("/wake_up", order(_wake_up), methods=["POST"]),
            Route("/role", order(_take_role), methods=["POST"]),
            Route("/reset_prefix_cache", order(_reset_prefix_cache), methods=["POST"]),
            Route("/is_sleeping", order(_is_sleeping, is_question=True)),
            WebSocketRoute("/link", pages.link),
        ]
    )


class _Pages:
    """What anyone may ask, and the link, whose routers prove themselves."""

    def __init__(self, node: NodeState) -> None:
        self._node = node

    async def health(self, _: Request) -> Response:
        engine = self._node.engine
        trouble = engine.trouble or ("" if engine.alive() else "the engine has ended")
        if trouble:
            return JSONResponse({"status": trouble}, status_code=503)
        return JSONResponse({"status": self._node.why_not() or "ok"})

    async def ready(self, _: Request) -> Response:
        if reason := self._node.why_not():
            return JSONResponse({"ready": False, "reason": reason}, status_code=503)
        return JSONResponse({"ready": True})

    async def status(self, _: Request) -> Response:
        return JSONResponse(self._node.describe())

    async def metrics(self, _: Request) -> Response:
        from pd_serve.node.metrics import render  # 50 ms that the start need not pay

        node = self._node
        body = render(
            node.engine.status,
            node.engine.ready,
            links=len(node.links),
            draining=node.draining,
            sleeping=node.sleep is not None and node.sleep.describe().is_sleeping,
            stuck=bool(node.engine.trouble),
        )
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def link(self, websocket: WebSocket) -> None:
        if "origin" in websocket.headers:  # a web page in somebody's browser here: loopback is open to it too
            await websocket.close()
            return
        node = self._node
        await node.links.serve(websocket, node.hello, node.why_not, node.engine)


# --- orders ---------------------------------------------------------------------------------------------

_Order = Callable[[NodeState, Request], Awaitable[msgspec.Struct]]  # what it answers, or raises Refused


def _check_sender(token: str, request: Request) -> None:
    """Raises Refused for who may give no orders. ``token``: what has to be shown; empty: nothing."""
    if token:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode(), token.encode()):
            raise Refused(401, "send 'Authorization: Bearer TOKEN': pd-serve token --secret-file FILE prints it")
    elif asks_for_others(request.headers):
        raise Refused(403, "web pages and proxies may give no orders here: ask from this machine itself")


def _check_state(node: NodeState) -> None:
    if node.engine.ready is None or node.draining:
        raise Refused(503, f"the node is {'shutting down' if node.draining else 'starting'}: try again")


def _sleep_of(node: NodeState) -> Sleep:
    if node.sleep is None:
        raise Refused(404, "this node cannot sleep: start it with --enable-sleep-mode")
    return node.sleep


async def _take_role(node: NodeState, request: Request) -> role.Document:
    fields = await _fields(request, "role")
    wanted = fields.get("role")
    if wanted not in ROLES:
        raise Refused(400, f"role is one of {', '.join(ROLES)}, not {wanted!r}: change it")
    return await node.switch.take(str(wanted))


async def _fall_asleep(node: NodeState, request: Request) -> Document:
    sleep = _sleep_of(node)
    fields = await _fields(request, "level")
    level = fields.get("level", 1)
    if str(level) not in map(str, LEVELS):
        raise Refused(
            400, f"level is 1 (keep the weights in host memory) or 2 (drop them too), not {level!r}: change it"
        )
    return await sleep.sleep(int(str(level)))


async def _wake_up(node: NodeState, request: Request) -> Document:
    sleep = _sleep_of(node)
    fields = await _fields(request, "tags")
    tags = fields.get("tags", list(TAGS))
    if not isinstance(tags, list) or not tags or not all(tag in TAGS for tag in tags):
        raise Refused(400, f"tags is a list of {' and '.join(TAGS)}, not {tags!r}: leave it out to wake everything")
    return await sleep.wake(tags)


class Reset(msgspec.Struct):
    """The answer to ``POST /reset_prefix_cache``: no later prompt finds what was cached before."""

    reset: bool = True


async def _reset_prefix_cache(node: NodeState, request: Request) -> Reset:
    if (await request.body()).strip() or request.query_params:
        raise Refused(400, "this order has no fields: leave query and body out")
    answer = await node.engine.forget()
    if answer.failure:
        raise Refused(503, answer.failure)
    return Reset()


async def _is_sleeping(node: NodeState, _: Request) -> Document:
    return _sleep_of(node).describe()


async def _fields(request: Request, known: str) -> dict[str, object]:
    """The fields of the query and of a JSON body, in which ``known`` is the only one there may be. Raises Refused."""
    body = await request.body()
    try:
        fields = msgspec.json.decode(body, type=dict[str, object]) if body.strip() else {}
    except msgspec.DecodeError as error:
        raise Refused(400, f"the body is not a JSON object ({error}): send {known} as JSON or in the query") from None
    for name in request.query_params:
        values: list[object] = list(request.query_params.getlist(name))
        fields[name] = values if name == "tags" else values[-1]
    for name in fields:
        if name != known:
            raise Refused(400, f"there is no field '{name:.50}': the only one is '{known}'")
    return fields
