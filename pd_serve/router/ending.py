"""How a router ends: what signals mean to its HTTP server."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from pd_serve.http_server import Server
from pd_serve.router.app import Router


class Draining(Server):
    """The first signal drains, a SIGTERM after ``drain_delay_s``; the second ends every stream with an error event.

    The exit status is 0.
    """

    signals = 0

    def __init__(self, config: uvicorn.Config, router: Router) -> None:
        super().__init__(config)
        self._router = router

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if (
            self.signals == 1
            and sig == signal.SIGTERM
            and self._router.settings.drain_delay_s
            and self.loop is not None
        ):
            self._router.begin_leaving()
            self.loop.call_soon_threadsafe(self.loop.call_later, self._router.settings.drain_delay_s, self._leave)
        else:
            self._leave()

    def _leave(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._router.begin_drain()
        seen = self.signals

        def look() -> None:
            if self.signals > seen:
                self._router.end_all()
            else:
                self._router.shared.clock.call_later(0.1, look)

        look()
        await super().shutdown(sockets)
