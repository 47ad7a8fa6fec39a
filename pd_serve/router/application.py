"""FastAPI's application without the layers that serve what FastAPI does itself.

Handlers here take a request and give an answer: there are no dependencies to end, no forms to close and no telemetry of
FastAPI's, which together cost a tenth of a request's CPU time (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pd_serve.router.documented import Documented


class Application(FastAPI):
    def __init__(self, served: Sequence[Documented], **options: Any) -> None:
        super().__init__(openapi_url=None, **options)  # FastAPI's own pages: ours is among the routes
        # Starlette's own routes answer HEAD where they answer GET, FastAPI's do not.
        heads = [Route(at.path, at.endpoint, methods=["HEAD"]) for at in served if at.method == "GET"]
        self.router.routes += [*served, *heads]
        self.router.middleware_stack = _Direct(self.router.middleware_stack, served)

    __call__ = Starlette.__call__
    build_middleware_stack = Starlette.build_middleware_stack


class _Direct:
    """Finds paths without parameters at once; the others, errors and redirects are the router's."""

    def __init__(self, router: ASGIApp, served: Sequence[Documented]) -> None:
        self._router = router
        self._found = {(at.method, at.path): at for at in served if "{" not in at.path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._found.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        await (self._router if found is None else found.app)(scope, receive, send)
