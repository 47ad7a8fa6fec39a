"""The router's HTTP surface: an ASGI application made of the settings, and what lives as long as it does.

Handlers read and check; generations do the rest (see :mod:`pd_serve.router.generation`). Everything that is
not a success has OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pd_serve import __version__, values
from pd_serve.api import schemas
from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.leniency import Leniency
from pd_serve.api.parsing import parse
from pd_serve.api.text_model import Prompt, unknown_model
from pd_serve.config import RouterConfig
from pd_serve.router.clock import LoopClock
from pd_serve.router.doors import Doors
from pd_serve.router.edge import Admin, Edge, request_id
from pd_serve.router.generation import Generation
from pd_serve.router.links import Links
from pd_serve.router.metrics import Metrics
from pd_serve.router.nodes import Group, Registry
from pd_serve.router.sequence import Shared
from pd_serve.router.status import describe, models
from pd_serve.trust import asks_for_others, is_loopback
from pd_serve.wire.registration import NONCE_HEADER, PROOF_HEADER

log = logging.getLogger(__name__)

_INLINE_BYTES = 16 << 10  # longer bodies are tokenised in a thread, so that streams do not pause
_SWEEP_S = 1.0
_T = TypeVar("_T")


class Router:
    """The running router: handlers are its methods."""

    def __init__(self, settings: RouterConfig) -> None:
        self.settings = settings
        self.registry = Registry()
        self.secret = settings.node_secret().encode()
        self.links = Links(settings, self.registry, self.secret)
        self.doors = Doors(self.secret, settings.allow_insecure_nodes, time.monotonic)
        self.metrics = Metrics()
        self.leniency = Leniency(strict=settings.strict_fields)
        self.shared: Shared
        self.begun_s: float  # on the clock
        self.started_s = time.time()

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.shared = Shared(self.settings, LoopClock(), self.metrics.count)
        self.begun_s = self.shared.clock.now_s()
        self.links.start()
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            await self.links.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = self.shared.clock.now_s()
            for sequence in list(self.shared.active):
                try:
                    sequence.check_time(now_s)
                except Exception:
                    log.exception("a request could not be checked")  # the others are still to be

    def begin_drain(self) -> None:
        """The server takes nothing new; what runs may finish for ``drain_timeout_s``."""
        if self.shared.draining:
            return
        self.shared.draining = True
        log.info("draining: %d sequences, at most %g s", len(self.shared.active), self.settings.drain_timeout_s)
        self.shared.clock.call_later(self.settings.drain_timeout_s, self.end_all)

    def end_all(self) -> None:
        """Every open request ends now, with an error that its client can read."""
        for sequence in list(self.shared.active):
            sequence.fail(
                APIError(503, "the router is shutting down: try again", code="shutting_down", retry_after_s=1)
            )

    # --- generation -----------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Generation:
        return await self._generate(request, schemas.CompletionRequest)

    async def chat_completions(self, request: Request) -> Generation:
        return await self._generate(request, schemas.ChatCompletionRequest)

    async def _generate(
        self, request: Request, kind: type[schemas.CompletionRequest] | type[schemas.ChatCompletionRequest]
    ) -> Generation:
        arrived_s = self.shared.clock.now_s()
        body = await self._body(request)

        parsed = await _off_loop(lambda: parse(kind, body, self.leniency), len(body))
        group = await self._group(parsed.model)
        text = group.text  # of now: a node with another one may link meanwhile

        def prompts_of() -> list[Prompt]:
            if isinstance(parsed, schemas.ChatCompletionRequest):
                return [text.chat_prompt(parsed)]
            return text.completion_prompts(parsed)

        prompts = await _off_loop(prompts_of, len(body))
        return Generation(
            request=parsed,
            prompts=prompts,
            group=group,
            text=text,
            shared=self.shared,
            metrics=self.metrics,
            request_id=request_id(request.scope),
            arrived_s=arrived_s,
        )

    async def _group(self, name: str) -> Group:
        """The group to serve ``name``, one that has nodes; waits ``node_wait_s`` for it where one may be about to come.

        That is so while no node was ever linked, for as long after this router's start, and where nodes of the model
        were here before. Raises APIError: 404 for a model that is not served, 503 where no node came.
        """
        wait_s = self.settings.node_wait_s
        deadline_s = self.shared.clock.now_s() + wait_s
        while True:
            group = self._find(name)
            if group is not None:
                return group
            names, now_s = self.registry.names(), self.shared.clock.now_s()
            until_s = deadline_s if not self.registry.seen or name in ("", *names) else self.begun_s + wait_s
            if self.shared.draining or now_s >= until_s:
                break
            await self._a_node(until_s - now_s)
        if names and name and name not in names:
            raise unknown_model(name, names)
        raise APIError(
            503,
            f"no node serves the model '{name[:200]}' now: start one, or try again later"
            if name
            else "no node is linked to this router: start nodes, or try again later",
            code="no_nodes",
            retry_after_s=wait_s,
        )

    def _find(self, name: str) -> Group | None:
        if not name:
            served = [known for known in self.registry.names() if self.registry.find(known) is not None]
            if len(served) > 1:
                raise bad_request(f"several models are served: name one of {', '.join(served)} in 'model'", "model")
            name = served[0] if served else ""
        return self.registry.find(name)

    async def _a_node(self, timeout_s: float) -> None:
        """Returns when a node was linked, or after that time."""
        came = asyncio.Event()
        self.registry.watchers.add(came.set)
        try:
            async with asyncio.timeout(timeout_s):
                await came.wait()
        except TimeoutError:
            pass
        finally:
            self.registry.watchers.discard(came.set)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)

        parsed = await _off_loop(lambda: parse(schemas.TokenizeRequest, body, self.leniency), len(body))
        text = (await self._group(parsed.model)).text

        def work() -> dict[str, object]:
            ids = text.tokenize(parsed)
            strings = [text.tokenizer.token(id) for id in ids] if parsed.return_token_strs else None
            return {
                "count": len(ids),
                "max_model_len": text.info.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }

        return _json(await _off_loop(work, len(body)))

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)

        parsed = await _off_loop(lambda: parse(schemas.DetokenizeRequest, body, self.leniency), len(body))
        text = (await self._group(parsed.model)).text

        def work() -> dict[str, object]:
            if parsed.tokens:
                text.check_ids(parsed.tokens, "tokens")
            return {"prompt": text.tokenizer.decode(parsed.tokens, skip_special_tokens=False)}

        return _json(await _off_loop(work, len(body)))

    async def tokenizer_info(self, request: Request) -> Response:
        group = await self._group(request.query_params.get("model", ""))
        return _json(group.text.tokenizer_info())

    # --- about the router -------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        found = models(self.registry, int(self.started_s))
        name = request.path_params.get("name")
        if not name:
            return _json({"object": "list", "data": found})
        for model in found:
            if model["id"] == name:
                return _json(model)
        raise unknown_model(name, self.registry.names())

    async def health(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        wanted = (self.settings.min_prefill, self.settings.min_decode)
        found = max((group.serving() for group in self.registry.groups.values()), default=(0, 0))
        enough = any(
            prefill >= wanted[0] and decode >= wanted[1]
            for prefill, decode in (group.serving() for group in self.registry.groups.values())
        )
        ready = enough and not self.shared.draining
        reason = (
            "draining"
            if self.shared.draining
            else f"{found[0]} prefill and {found[1]} decode nodes; {wanted[0]} and {wanted[1]} wanted"
        )
        return _json({"ready": ready} if ready else {"ready": False, "reason": reason}, 200 if ready else 503)

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.render(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, _: Request) -> Response:
        return _json(
            {
                "version": __version__,
                "uptime_s": time.time() - self.started_s,
                "draining": self.shared.draining,
                "in_flight": {name: own.in_flight for name, own in self.metrics.models.items()},
                "sequences": len(self.shared.active),
                **describe(self.registry, self.links.unlinked()),
                "refused_orders": self.doors.refusals(),
            }
        )

    async def add_node(self, request: Request) -> Response:
        if self.shared.draining:
            raise APIError(503, "this router is shutting down", code="shutting_down", retry_after_s=5)
        return await self._ordered(
            request, lambda url, instance: {"url": url, "state": self.links.add(url, instance=instance)}
        )

    async def remove_node(self, request: Request) -> Response:
        return await self._ordered(request, lambda url, _: {"url": url, "known": self.links.remove(url)})

    async def _ordered(self, request: Request, carry_out: Callable[[str, str], dict[str, object]]) -> Response:
        """An order about a node, from who may give it. ``carry_out``: of its URL and instance."""
        given = parse(schemas.NodeRequest, await self._body(request))
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
        return _json(carry_out(url, given.instance))

    async def _body(self, request: Request) -> bytes:
        """Raises APIError(413) as soon as the limit is passed; never holds more than the limit."""
        limit = self.settings.max_body_bytes
        too_large = APIError(
            413, f"the request body is larger than {limit} bytes: send less at once", code="body_too_large"
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise APIError(
                408, f"the request's body was not here after {self.settings.request_timeout_s:g} s: send it faster"
            ) from None
        except ClientDisconnect:
            raise APIError(499, "the client left while it sent the request") from None
        return b"".join(parts)


async def _off_loop(work: Callable[[], _T], size_bytes: int) -> _T:
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)


def _node_url(given: str) -> str:
    try:
        url = str(values.URL.parse(given))
    except ValueError:
        url = ""
    if not url:
        raise bad_request("'url' must be a node's address alone, such as http://10.0.0.2:8100", "url")
    return url


def _json(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


def create_app(settings: RouterConfig) -> Starlette:
    """``app.state.router`` is the :class:`Router`; it works while the application's lifespan runs."""
    router = Router(settings)

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        kind = error.code or str(error.status)
        router.metrics.count("errors", kind)
        router.metrics.count("requests", request.scope["path"] if error.status != 404 else "other", str(error.status))
        log.info("%s %s %d %s", request_id(request.scope), request.scope["path"], error.status, error.message)
        return _error(error, request)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.scope["path"][:200], request.scope["method"]
        message = {404: f"there is no {path} here", 405: f"{path} does not take {method}"}.get(
            error.status_code, error.detail
        )
        answer = _error(APIError(error.status_code, message), request)
        answer.headers.update(error.headers or {})
        return answer

    async def failed(request: Request, error: Exception) -> Response:
        answer = _error(APIError(500, "internal error of the router: see its log", code="internal"), request)
        answer.headers["X-Request-Id"] = request_id(request.scope)  # Starlette answers this outside of Edge
        return answer

    address = settings.admin_address()
    admin = None if address is None else Admin(address[1], needs_key=not is_loopback(address[0]))
    app = Starlette(
        routes=[
            Route("/v1/completions", router.completions, methods=["POST"]),
            Route("/v1/chat/completions", router.chat_completions, methods=["POST"]),
            Route("/v1/models", router.models),
            Route("/v1/models/{name:path}", router.models),
            Route("/v1/status", router.status),
            Route("/tokenize", router.tokenize, methods=["POST"]),
            Route("/detokenize", router.detokenize, methods=["POST"]),
            Route("/tokenizer_info", router.tokenizer_info),
            Route("/health", router.health),
            Route("/ready", router.ready),
            Route("/metrics", router.metrics_text),
            Route("/nodes", router.add_node, methods=["POST"]),
            Route("/nodes", router.remove_node, methods=["DELETE"]),
        ],
        middleware=[*_cors(settings), Middleware(Edge, api_keys=settings.api_keys(), admin=admin)],
        exception_handlers={APIError: api_error, HTTPException: http_error, Exception: failed},
        lifespan=router.lifespan,
    )
    app.state.router = router
    return app


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
    return Response(error.body(request_id(request.scope)), error.status, error.headers(), "application/json")
