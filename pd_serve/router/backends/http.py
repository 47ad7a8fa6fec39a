"""HTTP/1.1 to the server of another engine, as asyncio protocols: answers arrive in plain calls, without a task each.

Used by the backends of other engines, where every token of every stream passes. Parsing is httptools'.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from pd_serve.net import netloc

log = logging.getLogger(__name__)

# Engines' servers (uvicorn) end a connection that was idle for 5 s: one that is about to end is not used again.
_IDLE_S = 3.0
_MAX_BODY_BYTES = 64 << 20


class Answer(Protocol):
    """What an answer is told to, in order. None of its methods raises."""

    def head(self, status: int, kind: str) -> None:
        """``kind``: its media type."""

    def data(self, data: bytes) -> None: ...

    def end(self, error: str | None) -> None:
        """Once; with an error where the answer is not complete, or there is none."""


class Exchange:
    """A request and its answer. After ``give_up`` its answer is told nothing any more."""

    def __init__(self, request: bytes, answer: Answer) -> None:
        self.request = request
        self.answer: Answer | None = answer
        self.begun = False  # some of the answer came
        self.sent = False
        self.connection: _Connection | None = None
        self.opening: asyncio.Task[None] | None = None

    def give_up(self) -> None:
        """The server is told by the end of the connection."""
        self.answer = None
        if self.connection is not None:
            self.connection.drop()
        elif self.opening is not None:
            self.opening.cancel()

    def ended(self, error: str | None) -> None:
        answer, self.answer = self.answer, None
        self.connection = None
        if answer is not None:
            answer.end(error)


class Server:
    """``url``: without a path. ``key``: what it asks for as a bearer token; empty: nothing."""

    def __init__(self, url: str, key: str, connect_timeout_s: float, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.heard_s = time.monotonic()
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._head = f"HTTP/1.1\r\nHost: {netloc(self.host, self.port)}\r\nAccept: */*\r\n"
        self._head += f"Authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    def close(self) -> None:
        for connection in list(self._open):
            connection.drop()

    def post(self, path: str, body: bytes, answer: Answer, headers: Mapping[str, str] | None = None) -> Exchange:
        """Begins at once where a connection is open. ``headers``: clean."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"POST {path} {self._head}{lines}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return self._begin(head.encode("latin-1") + body, answer)

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        return await self._whole(f"GET {path} {self._head}\r\n".encode("latin-1"), timeout_s)

    async def ask(self, path: str, body: bytes, timeout_s: float) -> tuple[int, str, bytes]:
        """Status, media type and body of the answer to a POST. Raises OSError."""
        whole = Whole()
        exchange = self.post(path, body, whole)
        return await self._of(exchange, whole, timeout_s)

    async def _whole(self, request: bytes, timeout_s: float) -> tuple[int, bytes]:
        whole = Whole()
        status, _, body = await self._of(self._begin(request, whole), whole, timeout_s)
        return status, body

    async def _of(self, exchange: Exchange, whole: Whole, timeout_s: float) -> tuple[int, str, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                return await whole.done
        finally:
            if not whole.done.done() or whole.done.cancelled():
                exchange.give_up()

    def _begin(self, request: bytes, answer: Answer) -> Exchange:
        exchange = Exchange(request, answer)
        now_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if now_s - connection.since_s < _IDLE_S and connection.usable:
                connection.carry(exchange)
                return exchange
            connection.drop()
        self._connect(exchange)
        return exchange

    def _connect(self, exchange: Exchange) -> None:
        exchange.opening = asyncio.get_running_loop().create_task(self._opened(exchange))

    async def _opened(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self.host, self.port, ssl=self._tls
                )
        except (OSError, ssl.SSLError) as error:
            exchange.ended(f"cannot connect to {self.url}: {str(error) or type(error).__name__}")
            return
        if exchange.answer is None:
            connection.drop()
        else:
            connection.carry(exchange)

    # --- called by connections --------------------------------------------------------------------------

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)

    def free(self, connection: _Connection) -> None:
        self._idle.append(connection)

    def lost(self, connection: _Connection, exchange: Exchange | None, used: bool) -> None:
        """``used``: it carried an exchange before this one."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if exchange is None or exchange.answer is None:
            return
        if used and not exchange.begun:
            self._connect(exchange)  # the server ended an idle connection as we wrote to it: it has read nothing
        else:
            exchange.ended(f"the connection to {self.url} was lost")


class Whole:
    """An answer that is taken as a whole."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, str, bytes]] = asyncio.get_running_loop().create_future()
        self._status, self._kind = 0, ""
        self._parts: list[bytes] = []
        self._size = 0

    def head(self, status: int, kind: str) -> None:
        self._status, self._kind = status, kind

    def data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= _MAX_BODY_BYTES:
            self._parts.append(data)

    def end(self, error: str | None) -> None:
        if self.done.done():
            return
        if error is None and self._size > _MAX_BODY_BYTES:
            error = f"an answer of {self._size} bytes"
        if error is not None:
            self.done.set_exception(ConnectionError(error))
            self.done.exception()  # nobody may be waiting
        else:
            self.done.set_result((self._status, self._kind, b"".join(self._parts)))


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.since_s = 0.0  # idle
        self._server = server
        self._transport: asyncio.Transport
        self._exchange: Exchange | None = None
        self._used = False
        self._kind = ""
        self._complete = False

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    def carry(self, exchange: Exchange) -> None:
        self._exchange = exchange
        exchange.connection = self
        exchange.sent = True
        self._parser = httptools.HttpResponseParser(self)
        self._kind, self._complete = "", False
        self._transport.write(exchange.request)

    def drop(self) -> None:
        self._exchange = None
        self._transport.abort()

    # --- asyncio ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self._transport.abort()  # nobody asked
            return
        self._server.heard_s = time.monotonic()
        exchange.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            log.debug("%s: %s", self._server.url, error)
            self.drop()
            exchange.ended(f"{self._server.url} answered what is no HTTP")
            return
        if self._complete and self._exchange is exchange:
            self._exchange, self._used = None, True
            if self._parser.should_keep_alive() and self.usable:
                self.since_s = time.monotonic()
                self._server.free(self)
            else:
                self._transport.close()
            exchange.ended(None)

    def connection_lost(self, error: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._server.lost(self, exchange, self._used)

    # --- httptools --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._kind = value.partition(b";")[0].strip().decode("latin-1").lower()

    def on_headers_complete(self) -> None:
        if (answer := self._told()) is not None:
            answer.head(self._parser.get_status_code(), self._kind)

    def on_body(self, body: bytes) -> None:
        if (answer := self._told()) is not None:
            answer.data(body)

    def on_message_complete(self) -> None:
        self._complete = True

    def _told(self) -> Answer | None:
        return self._exchange.answer if self._exchange is not None else None
