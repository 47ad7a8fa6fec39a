"""A streaming HTTP client that costs the machine under test as little as possible.

One TCP connection is one ``Connection``; server-sent events are handed to a callback the moment they are
read. Per event it takes about 8 µs of CPU (httptools on uvloop), where httpx takes about 60: on a small
machine the difference would be measured as the server's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

OnEvent = Callable[[float, bytes], None]  # when it was read (perf_counter), the event's data


class HttpError(Exception):
    """The endpoint, or the way to it, failed; the message is fit for counting."""


class Answer(NamedTuple):
    status: int
    body: bytes  # empty for an event stream
    retry_after: str  # the header, empty without one


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._on_event: OnEvent | None = None
        self._buffer = b""
        self._streams = False
        self._now_s = 0.0
        self._retry_after = ""
        self._parser = httptools.HttpResponseParser(self)
        self.reusable = False

    async def request(self, head: bytes, body: bytes, on_event: OnEvent) -> Answer:
        """Sends one request. Raises HttpError."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._on_event, self._buffer, self._streams, self.reusable = on_event, b"", False, False
        self._retry_after = ""
        self._transport.write(head + body)
        await self._done
        body = b"" if self._streams else self._buffer
        return Answer(self._parser.get_status_code(), body, self._retry_after)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- asyncio ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"an answer that cannot be read: {error.__context__ or error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._fail("connection closed in mid-answer" if error is None else f"connection lost: {error}")

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(message))

    # --- httptools --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._streams = value.startswith(b"text/event-stream")
        elif name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        self._buffer = self._buffer + chunk if self._buffer else chunk
        if not self._streams:
            return
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and self._on_event is not None:
                self._on_event(self._now_s, line[5:].strip())

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Connections to one endpoint, used again where the server lets us."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or "127.0.0.1"
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._headers = f"host: {parts.netloc}\r\naccept: */*\r\n"
        if api_key:
            self._headers += f"authorization: Bearer {api_key}\r\n"
        self._timeout_s = timeout_s
        self._idle: deque[Connection] = deque()

    async def get(self, path: str) -> Answer:
        return await self._exchange(
            f"GET {path} HTTP/1.1\r\n{self._headers}\r\n".encode(), b"", lambda _now, _data: None
        )

    async def post(self, path: str, body: bytes, on_event: OnEvent) -> Answer:
        """Raises HttpError."""
        headers = f"{self._headers}content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head = f"POST {path} HTTP/1.1\r\n{headers}\r\n"
        return await self._exchange(head.encode(), body, on_event)

    async def _exchange(self, head: bytes, body: bytes, on_event: OnEvent) -> Answer:
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect()
                return await connection.request(head, body, on_event)
        except TimeoutError:
            raise HttpError(f"no end after {self._timeout_s:g} s") from None
        except OSError as error:
            raise HttpError(f"cannot connect: {error.strerror or error}") from None
        finally:
            if connection is not None:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls or None)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
