"""Serves the page's three files. Of our own making: Swagger UI is a megabyte, or somebody else's host."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from pd_serve.router.dashboard.page import HEADERS

FILES = {
    "/docs": ("page.html", "text/html"),
    "/docs/app.js": ("app.js", "text/javascript"),
    "/docs/style.css": ("style.css", "text/css"),
}


async def file(request: Request) -> Response:
    """A page that shows this description and sends requests"""
    name, kind = FILES[request.scope["path"]]
    return Response((Path(__file__).parent / name).read_bytes(), media_type=kind, headers=HEADERS)
