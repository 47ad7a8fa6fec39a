"""Accepting TLS connections: a handshake counts as a connection and has its time, like a request's head.

Used by the router's and the nodes' servers. asyncio's own ``create_server`` waits a minute for each handshake, knows
nobody's number, and uvicorn has no setting for either: strangers who say nothing would use up all files.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial

from pd_serve.http import Bounds

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0  # for a client that keeps an idle connection open: it need not notice that we end it
_PAUSE_S = 0.1  # after an accept that failed, as it does when files run out
_MOST_AT_ONCE = 64  # accepted in a row, before others have their turn


class TlsListener:
    """``num_connections`` counts those whose handshake is done. What it began at its end is ended."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.Protocol],
        bounds: Bounds,
        num_connections: Callable[[], int],
    ) -> None:
        self._listener = listener
        self._context = context
        self._make_protocol = make_protocol
        self._bounds = bounds
        self._num_connections = num_connections
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[object], None] = {}  # the oldest first
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accepts no more, and ends handshakes. Idempotent."""
        self._loop.remove_reader(self._listener)
        for handshake in self._handshakes:
            handshake.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("cannot accept connections: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_PAUSE_S, self._accept_again)
                return
            self._make_room()
            handshake = self._loop.create_task(self._shake_hands(accepted))
            self._handshakes[handshake] = None
            handshake.add_done_callback(partial(self._done, accepted))

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _make_room(self) -> None:
        """Ends the handshake that has lasted longest where there are too many; the protocol sees to what comes then."""
        if self._handshakes and len(self._handshakes) + self._num_connections() >= self._bounds.max_connections:
            oldest = next(iter(self._handshakes))
            oldest.cancel()
            del self._handshakes[oldest]

    async def _shake_hands(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        await self._loop.connect_accepted_socket(
            self._make_protocol,
            accepted,
            ssl=self._context,
            ssl_handshake_timeout=self._bounds.head_timeout_s,
            ssl_shutdown_timeout=_FAREWELL_S,
        )

    def _done(self, accepted: socket.socket, handshake: asyncio.Task[object]) -> None:
        self._handshakes.pop(handshake, None)
        if handshake.cancelled():  # perhaps before it began
            accepted.close()
        elif (error := handshake.exception()) is not None:
            accepted.close()
            log.log(logging.DEBUG if isinstance(error, OSError) else logging.ERROR, "a TLS handshake failed: %r", error)
