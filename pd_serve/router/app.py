"""The router's HTTP surface: an ASGI application made of the settings, and what lives as long as it does.

Its own handlers are those for operators and nodes; clients' are in :mod:`pd_serve.router.request`. Everything that
is not a success has OpenAI's error shape, or Anthropic's below its path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from pd_serve import __version__, values
from pd_serve.api import schemas
from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.messages_api.errors import body_at
from pd_serve.api.parsing import parse
from pd_serve.api.text_model import unknown_model
from pd_serve.config import RouterConfig
from pd_serve.router.application import Application
from pd_serve.router.dashboard.frames import frame
from pd_serve.router.dashboard.page import Dashboard
from pd_serve.router.dashboard.recent import Recent
from pd_serve.router.documented import Description, allowed_methods
from pd_serve.router.doors import Doors
from pd_serve.router.groups import Registry
from pd_serve.router.line import Timer
from pd_serve.router.links import Links
from pd_serve.router.metrics import Metrics
from pd_serve.router.middleware import Admin, Edge, request_id, wants_key
from pd_serve.router.plain import nowhere
from pd_serve.router.request import Requests, body, json_response
from pd_serve.router.routes import TAGS, routes
from pd_serve.router.siblings import Question, Siblings, gathered, joined_metrics, joined_status
from pd_serve.router.spans import Traced
from pd_serve.router.status import describe, models
from pd_serve.router.stream import Shared
from pd_serve.trust import asks_for_others, is_loopback
from pd_serve.wire.registration import NONCE_HEADER, PROOF_HEADER

if TYPE_CHECKING:
    from pd_serve.otel import Tracing

log = logging.getLogger(__name__)

_INLINE_BYTES = 16 << 10  # longer bodies are tokenised in a thread, so that streams do not pause
_SWEEP_S = 1.0
_T = TypeVar("_T")


class _LoopClock:
    now_s = staticmethod(time.monotonic)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)


class Router:
    """The running router: handlers are its methods."""

    def __init__(
        self, settings: RouterConfig, siblings: Siblings | None = None, tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self._tracing = tracing
        self.registry = Registry()
        self.secret = settings.node_secret().encode()
        self.links = Links(settings, self.registry, self.secret)
        self.doors = Doors(
            self.secret, settings.allow_insecure_nodes, time.monotonic, siblings.key if siblings else b""
        )
        self.siblings = siblings
        self.metrics = Metrics(vllm_names=settings.vllm_metric_names)
        self.shared = Shared(settings, _LoopClock(), self.metrics.count)
        self.requests = Requests(self.registry, self.shared, self.metrics)
        self.started_s = time.time()
        self.leaving = False
        self.recent = Recent(self.metrics, self.started_s)
        self.dashboard = Dashboard(self.recent, self.frame, lambda: self.shared.draining and not self.shared.active)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.links.start()
        sweeper = asyncio.create_task(self._sweep())
        if self.siblings is not None:
            await self.siblings.start(self._answer)
            for nodes in (await self.siblings.ask({"what": "nodes"})).values():
                self._learn(nodes or {})
        try:
            yield
        finally:
            sweeper.cancel()
            if self.siblings is not None:
                self.siblings.close()
            await self.links.close()
            self.requests.close()
            if self._tracing is not None:
                await self._tracing.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = self.shared.clock.now_s()
            self.recent.sample(time.time(), len(self.shared.active))
            for stream in list(self.shared.active):
                try:
                    stream.check_time(now_s)
                except Exception:
                    log.exception("a request could not be checked")  # the others are still to be

    def begin_leaving(self) -> None:
        """Whoever asks for readiness hears that this router goes; requests are taken as before."""
        self.leaving = True
        log.info("leaving: not ready any more, takes requests for %g s", self.settings.drain_delay_s)

    def begin_drain(self) -> None:
        """The server takes nothing new; what runs may finish for ``drain_timeout_s``."""
        if self.shared.draining:
            return
        self.shared.draining = True
        log.info("draining: %d streams, at most %g s", len(self.shared.active), self.settings.drain_timeout_s)
        self.shared.clock.call_later(self.settings.drain_timeout_s, self.end_all)

    def end_all(self) -> None:
        """Every open request ends now, with an error that its client can read."""
        for stream in list(self.shared.active):
            stream.fail(APIError(503, "the router is shutting down: try again", code="shutting_down", retry_after_s=1))

    # --- what operators and nodes ask -----------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        """The models that have nodes"""
        return json_response({"object": "list", "data": models(self.registry, int(self.started_s))})

    async def model(self, request: Request) -> Response:
        """One model, if it has nodes"""
        name = request.path_params["name"]
        if not name:
            return await self.models(request)
        for model in models(self.registry, int(self.started_s)):
            if model["id"] == name:
                return json_response(model)
        raise unknown_model(name, self.registry.names())

    async def ready(self, _: Request) -> Response:
        """200 with enough nodes to serve, else 503 and why

        Of all of a router's processes: any of them may get the next connection.
        """
        found = await gathered(self.siblings, "ready", self._why_not_ready())
        reason = next((why for why in found.values() if why), "")
        if not reason and None in found.values():
            reason = "a router process is being started"
        return json_response({"ready": False, "reason": reason} if reason else {"ready": True}, 503 if reason else 200)

    def _why_not_ready(self) -> str:
        """Empty where it is."""
        wanted = (self.settings.min_prefill, self.settings.min_decode)
        found = max((group.serving() for group in self.registry.groups.values()), default=(0, 0))
        enough = any(
            prefill >= wanted[0] and decode >= wanted[1]
            for prefill, decode in (group.serving() for group in self.registry.groups.values())
        )
        leaving = self.leaving or self.shared.draining
        if leaving:
            return "draining"
        return "" if enough else f"{found[0]} prefill and {found[1]} decode nodes; {wanted[0]} and {wanted[1]} wanted"

    async def metrics_text(self, _: Request) -> Response:
        """Metrics in Prometheus' text format"""
        text = self.metrics.render(self.registry)
        if self.siblings is not None:
            texts = await gathered(self.siblings, "metrics", text.decode())
            text = await asyncio.to_thread(joined_metrics, texts, self.siblings.index)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, _: Request) -> Response:
        """Nodes, their state and load"""
        mine = self._status()
        if self.siblings is not None:
            mine = joined_status(mine, await gathered(self.siblings, "status", mine))
        return json_response(mine)

    def _status(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": time.time() - self.started_s,
            "draining": self.shared.draining,
            "in_flight": {name: own.in_flight for name, own in self.metrics.models.items()},
            "sequences": len(self.shared.active),
            **describe(self.registry, self.links.unlinked()),
            "refused_orders": self.doors.refusals(),
        }

    def frame(self) -> dict[str, object]:
        """What the dashboard shows of now."""
        return {
            "version": __version__,
            "uptime_s": time.time() - self.started_s,
            "draining": self.shared.draining or self.leaving,
            **frame(self.registry, self.links.unlinked(), self.shared.active, self.shared.clock.now_s()),
        }

    async def add_node(self, request: Request) -> Response:
        """A node registers, by proof of the secret"""
        if self.shared.draining:
            raise APIError(503, "this router is shutting down", code="shutting_down", retry_after_s=5)
        return await self._ordered(
            request, lambda url, instance: {"url": url, "state": self.links.add(url, instance=instance)}
        )

    async def remove_node(self, request: Request) -> Response:
        """A node leaves, by proof of the secret"""
        return await self._ordered(request, lambda url, _: {"url": url, "known": self.links.remove(url)})

    async def _ordered(self, request: Request, carry_out: Callable[[str, str], dict[str, object]]) -> Response:
        """An order about a node, from who may give it. ``carry_out``: of its URL and instance."""
        given = parse(schemas.NodeRequest, await body(request, self.settings))
        url = _node_url(given.url)
        headers = request.headers
        try:
            self.doors.check(
                request.method,
                url,
                request.client.host if request.client and not asks_for_others(headers) else "",
                headers.get(NONCE_HEADER, ""),
                headers.get(PROOF_HEADER, ""),
                headers.get("authorization", "").removeprefix("Bearer "),
            )
        except APIError as error:
            if error.code != "proof_wanted":
                host = request.client.host if request.client else "a socket"
                self.doors.refuse(request.method, url, host, error.message)
                raise
            answer = _error(error, request)
            answer.headers[NONCE_HEADER] = self.doors.nonce()
            return answer
        done = carry_out(url, given.instance)
        if self.siblings is not None:
            order = {"what": request.method, "url": url, "instance": given.instance}
            await self.siblings.ask(order | {"nonce": headers.get(NONCE_HEADER, "")})
        return json_response(done)

    # --- what the other processes on this port ask, and are asked -------------------------------------

    def _answer(self, question: Question) -> object:
        match question["what"]:
            case "ready":
                return self._why_not_ready()
            case "metrics":
                return self.metrics.render(self.registry).decode()
            case "status":
                return self._status()
            case "nodes":
                return self.links.registered()
            case "POST":
                self.doors.use(question["nonce"])
                self._learn({question["url"]: question["instance"]})
            case "DELETE":
                self.doors.use(question["nonce"])
                self.links.remove(question["url"])
        return {}

    def _learn(self, nodes: dict[str, str]) -> None:
        if not self.shared.draining:
            for url, instance in nodes.items():
                with contextlib.suppress(APIError):  # too many: the node hears it where it asked
                    self.links.add(url, instance=instance)


def _node_url(given: str) -> str:
    try:
        url = str(values.URL.parse(given))
    except ValueError:
        url = ""
    if not url:
        raise bad_request("'url' must be a node's address alone, such as http://10.0.0.2:8100", "url")
    return url


def create_app(settings: RouterConfig, siblings: Siblings | None = None, tracing: Tracing | None = None) -> FastAPI:
    """``app.state.router`` is the :class:`Router`; it works while the application's lifespan runs.

    ``siblings``: the other processes on its port. ``tracing``: closed with it.
    """
    router = Router(settings, siblings, tracing)

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        kind = error.code or str(error.status)
        router.metrics.count("errors", kind)
        router.metrics.count("requests", request.scope["path"] if error.status != 404 else "other", str(error.status))
        id, path = request_id(request.scope), request.scope["path"]
        fields = {"path": path, "status": error.status}
        log.info("%s %s %d %s", id, path, error.status, error.message, extra={"request_id": id, "fields": fields})
        return _error(error, request)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.scope["path"][:200], request.scope["method"]
        message = {404: nowhere(path, {route.path for route in served}), 405: f"{path} does not take {method}"}.get(
            error.status_code, error.detail
        )
        answer = _error(APIError(error.status_code, message), request)
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # the error knows the first route of the path alone
            allowed = allowed_methods(served, request.scope)
            answer.headers["Allow"] = ", ".join(allowed)
            if method == "OPTIONS":
                answer = Response(status_code=204, headers={"Allow": answer.headers["Allow"]})
        return answer

    async def failed(request: Request, error: Exception) -> Response:
        answer = _error(APIError(500, "internal error of the router: see its log", code="internal"), request)
        answer.headers["X-Request-Id"] = request_id(request.scope)  # Starlette answers this outside of Edge
        return answer

    address = settings.admin_address()
    admin = None if address is None else Admin(address[1], needs_key=not is_loopback(address[0]))
    description = Description(
        TAGS,
        keyed=lambda path: bool(settings.api_keys()) and wants_key(path, admin),
        hidden=lambda path, request: admin is not None and admin.hides(request.scope, path),
        strict=settings.strict_fields,
    )
    served = description.routes = routes(router, description)
    app = Application(
        served,
        middleware=_middleware(settings, admin, tracing),
        exception_handlers={APIError: api_error, HTTPException: http_error, Exception: failed},
        lifespan=router.lifespan,
    )
    app.state.router = router
    return app


def _middleware(settings: RouterConfig, admin: Admin | None, tracing: Tracing | None) -> list[Middleware]:
    """The outermost first."""
    return [
        *_cors(settings),
        Middleware(Edge, api_keys=settings.api_keys(), admin=admin, at_once=settings.max_concurrent_per_key),
        *([] if tracing is None else [Middleware(Traced, tracing=tracing)]),
    ]


def _cors(settings: RouterConfig) -> list[Middleware]:
    """Outside of the keys: browsers ask first, and send no key with the question."""
    if not settings.cors_origin:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Warning", "Retry-After"],
        )
    ]


def _error(error: APIError, request: Request) -> Response:
    body = body_at(request.scope["path"], error, request_id(request.scope))
    return Response(body, error.status, error.headers(), "application/json")
