"""FastAPI's application without the layers that serve what FastAPI does itself.

Handlers here take a request and give an answer: there are no dependencies to end, no forms to close and no telemetry of
FastAPI's, which together cost a tenth of a request's CPU time (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.router.documented import Documented

Refused = Callable[[Request, APIError], Awaitable[Response]]


class Application(FastAPI):
    def __init__(self, served: Sequence[Documented], **options: Any) -> None:
        super().__init__(openapi_url=None, **options)  # FastAPI's own pages: ours is among the routes
        # Starlette's own routes answer HEAD where they answer GET, FastAPI's do not.
        heads = [Route(at.path, at.endpoint, methods=["HEAD"]) for at in served if at.method == "GET"]
        self.router.routes += [*served, *heads]
        self._served = served

    __call__ = Starlette.__call__

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette's, and within it what finds paths at once, before the layers for all others."""
        refused: Any = self.exception_handlers[APIError]
        self.user_middleware = [*self.user_middleware, Middleware(_Direct, served=self._served, refused=refused)]
        return Starlette.build_middleware_stack(self)  # once


class _Direct:
    """Answers paths without parameters at once; the others, redirects and what is nowhere are the router's.

    ``refused``: makes the answer of an APIError that a handler raised.
    """

    def __init__(self, app: ASGIApp, served: Sequence[Documented], refused: Refused) -> None:
        self._app = app
        self._refused = refused
        self._found = {(at.method, at.path): at.endpoint for at in served if "{" not in at.path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._found.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            answer = await handler(request)
        except APIError as error:
            answer = await self._refused(request, error)
        await answer(scope, receive, send)
