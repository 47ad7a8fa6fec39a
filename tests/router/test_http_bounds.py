"""Strangers who send too much, too little or nothing: they are ended, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import uvicorn

from pd_serve.config import RouterConfig
from pd_serve.http import bounded
from tests.router.conftest import Running, StartRouter

pytestmark = pytest.mark.timeout(30)

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
CHUNKED = POST.replace(b"content-length: 100", b"transfer-encoding: chunked")
LATE = b"HTTP/1.1 408"


class Stranger:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def pour(self, *pieces: bytes) -> None:
        """Sends it all, or as much as the other end lets through."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()

    async def answer(self) -> bytes:
        """All that comes until the other end closes; raises TimeoutError where it does not."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), 8)
        return b""


@contextlib.asynccontextmanager
async def connected(router: Running) -> AsyncIterator[Stranger]:
    host, _, port = router.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Stranger(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def others_are_served(router: Running) -> AsyncIterator[None]:
    """Meanwhile other clients are answered within half a second."""
    slowest_s, ended = 0.0, False

    async def ask() -> None:
        nonlocal slowest_s
        while not ended:
            begin_s = time.monotonic()
            assert (await router.http.get("/health")).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - begin_s)
            await asyncio.sleep(0.02)

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        ended = True
        await asking
    assert slowest_s < 0.5


@pytest.fixture
async def router(start_router: StartRouter) -> Running:
    return await start_router(ready=False, head_timeout_s=0.5, body_timeout_s=0.5, max_connections=12)


@pytest.mark.parametrize(
    ("head", "more", "status"),
    [
        (GET + b"x-long: ", b"a" * (1 << 20), b"431"),
        (b"GET /", b"a" * (1 << 20), b"414"),
        (GET, b"x-many: 1\r\n" * 50_000, b"431"),
        (GET + b"x: 1\r\n" * 200 + b"\r\n", b"", b"431"),
        (b"nonsense\r\n\r\n", b"", b"400"),
        (
            POST.replace(b"content-length: 100", b"transfer-encoding: chunked") + b"1\r\na\r\n0\r\n",
            b"t: 1\r\n" * 50_000,
            b"431",
        ),
    ],
    ids=["a header", "a URL", "many headers", "many small headers", "nonsense", "trailers"],
)
async def test_what_is_too_long_is_refused_at_once(router: Running, head: bytes, more: bytes, status: bytes) -> None:
    before = psutil.Process().memory_info().rss
    async with others_are_served(router), connected(router) as stranger:
        await stranger.pour(head, *[more] * 20)
        answer = await stranger.answer()
    assert answer[:12] in (b"HTTP/1.1 " + status, b"")
    if not more:
        assert answer[:12] == b"HTTP/1.1 " + status  # all was read: the answer cannot have been lost
        assert b'{"error"' in answer
    assert psutil.Process().memory_info().rss - before < 32 << 20


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"\r\n", b""),
        (b"GET / HT", b"HTTP/1.1 408"),
        (GET, b"HTTP/1.1 408"),
        (POST + b"{", b"HTTP/1.1 408"),
    ],
    ids=["nothing", "an empty line", "part of a line", "part of a head", "part of a body"],
)
async def test_what_never_comes_is_not_waited_for(router: Running, sent: bytes, status: bytes) -> None:
    async with connected(router) as stranger:
        await stranger.pour(sent)
        assert (await stranger.answer())[:12] == status
    assert not router.router.shared.active


async def test_a_head_that_comes_byte_by_byte_has_one_time_in_all(router: Running) -> None:
    async def dribble(stranger: Stranger) -> None:
        await stranger.pour(GET + b"x-long: ")
        while True:
            await stranger.pour(b"a")
            await asyncio.sleep(0.05)

    async with connected(router) as stranger:
        dribbling = asyncio.create_task(dribble(stranger))
        assert (await stranger.answer())[:12] in (b"HTTP/1.1 408", b"")
        dribbling.cancel()


async def test_slow_bodies_and_second_requests_are_served(router: Running) -> None:
    """A body in pieces whose pauses are short, then, on the same connection, another request after a longer pause."""
    async with connected(router) as client:
        body = b'{"model": "none", "prompt": "x", "ppp": "x" }' + b" " * 55
        await client.pour(POST)
        for at in range(0, 100, 20):
            await asyncio.sleep(0.2)
            await client.pour(body[at : at + 20])
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 ") and b"408" not in head[:14]
        await asyncio.sleep(1.2)
        await client.pour(GET + b"\r\n")
        assert b"HTTP/1.1 200" in await client.reader.readuntil(b'"ok"}')


async def test_silent_connections_lock_nobody_out(start_router: StartRouter) -> None:
    router = await start_router(ready=False, max_connections=12)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            for _ in range(20):
                await stack.enter_async_context(connected(router))
            async with connected(router) as client:
                await client.pour(GET + b"connection: close\r\n\r\n")
                assert (await client.answer()).startswith(b"HTTP/1.1 200")


async def test_pipelined_requests_are_bounded(router: Running) -> None:
    async with connected(router) as client:
        await client.pour((GET + b"\r\n") * 8)
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 8:
            seen += await asyncio.wait_for(client.reader.read(65536), 5)
    async with others_are_served(router), connected(router) as stranger:
        await stranger.pour((GET + b"\r\n") * 10_000)
        await stranger.answer()


async def test_an_answer_that_precedes_the_end_of_the_body_ends_the_connection(start_router: StartRouter) -> None:
    router = await start_router(ready=False, max_body_bytes=1000)
    async with connected(router) as client:
        await client.pour(POST.replace(b"100", b"1000000"), b"x" * 100_000)
        assert (await client.answer()).startswith(b"HTTP/1.1 413")


def test_uvicorn_has_what_the_protocol_relies_on() -> None:
    config = uvicorn.Config(lambda: None, http=bounded(RouterConfig()), log_config=None)
    config.load()
    state: Any = uvicorn.server.ServerState()
    loop = asyncio.new_event_loop()
    protocol: Any = config.http_protocol_class(config=config, server_state=state, app_state={}, _loop=loop)  # type: ignore[call-arg]
    names = "connections pipeline cycle headers flow transport loop server_state"
    for name in names.split():
        assert hasattr(protocol, name), name
    theirs = type(protocol).__mro__[2]
    calls = "on_message_begin on_headers_complete on_body on_message_complete on_response_complete"
    for name in [*calls.split(), "send_400_response", "handle_websocket_upgrade"]:
        assert hasattr(theirs, name), name
    loop.close()
