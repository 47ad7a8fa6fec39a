"""Serves the page and its events. Frames are made while somebody watches, one a second for all who do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.http import abort
from pd_serve.router.dashboard.recent import Recent

FILES = {
    "": ("page.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
FRAME_S = 1.0
MAX_WATCHERS = 8
_SEND_S = 10.0  # a watcher that does not read for so long is let go
# Nothing but the page's own files runs or is asked for, whatever a node calls itself.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {  # of pages
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Dashboard:
    """``describe``: the frame of now, without what :class:`Recent` knows. ``ended``: nothing will change any more."""

    def __init__(self, recent: Recent, describe: Callable[[], dict[str, Any]], ended: Callable[[], bool]) -> None:
        self._recent = recent
        self._describe = describe
        self._ended = ended
        self.watchers = 0
        self._frame = b""
        self._made_s = 0.0

    async def file(self, request: Request) -> Response:
        """A page that shows nodes, lanes and streams"""
        name, kind = FILES[request.scope["path"].removeprefix("/dashboard")]
        return Response((Path(__file__).parent / name).read_bytes(), media_type=kind, headers=HEADERS)

    async def events(self, _: Request) -> Watch:
        """What the page shows, as server-sent events"""
        if self.watchers >= MAX_WATCHERS:
            raise APIError(
                429,
                f"{MAX_WATCHERS} pages watch this router already: close one",
                code="too_many_watchers",
                retry_after_s=5,
            )
        return Watch(self)

    def history(self) -> bytes:
        return _event("history", {"points": self._recent.points()})

    def frame(self) -> bytes:
        """Made once a second, whoever asks; the last one says that it is."""
        now_s = time.monotonic()
        if now_s - self._made_s >= FRAME_S / 2 or self.ended:
            newest = self._recent.points(1)
            self._frame = _event(
                "frame",
                {
                    **self._describe(),
                    "last_minute": self._recent.last_minute(),
                    "point": newest[0] if newest else None,
                },
            )
            self._made_s = now_s
        return self._frame

    @property
    def ended(self) -> bool:
        return self._ended()


class Watch:
    """One watcher's answer, an ASGI response: the last minutes, then a frame a second until the watcher leaves."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._dashboard.watchers += 1
        left = asyncio.create_task(_until_left(receive))
        try:
            await self._tell(left, send)
        except TimeoutError:
            abort(scope)
        finally:
            self._dashboard.watchers -= 1
            left.cancel()

    async def _tell(self, left: asyncio.Task[None], send: Send) -> None:
        async def say(event: bytes) -> None:
            async with asyncio.timeout(_SEND_S):
                await send({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await say(self._dashboard.history())
        loop = asyncio.get_running_loop()
        while not left.done():
            await say(self._dashboard.frame())
            if self._dashboard.ended:
                break
            # whole seconds of the loop's clock: all watchers take the same frame
            await asyncio.wait([left], timeout=FRAME_S - loop.time() % FRAME_S)
        await send({"type": "http.response.body", "body": b""})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, document: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(document))
