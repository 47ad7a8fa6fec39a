"""TLS connections: whoever does not finish a handshake is ended, and locks nobody out."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pd_serve import http_server
from pd_serve.config import RouterConfig
from pd_serve.http import bounded
from pd_serve.http_server import Server
from tests.certificates import make_certificate

pytestmark = pytest.mark.timeout(30)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Listening:
    def __init__(self, port: int, certificate: str) -> None:
        self.port = port
        self.idle: http.client.HTTPSConnection | None = None
        self._context = ssl.create_default_context(cafile=certificate)

    def silent(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=8)

    def keep_alive(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self._context, timeout=8)

    def ask(self) -> int:
        with contextlib.closing(self.keep_alive()) as client:
            client.request("GET", "/")
            return client.getresponse().status


@pytest.fixture(params=["asyncio", "uvloop"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listening]:
    certificate, key = make_certificate(tmp_path)
    settings = RouterConfig(head_timeout_s=1.0, max_connections=8)
    server = Server(
        uvicorn.Config(
            app, http=bounded(settings), loop=request.param, lifespan="off", log_config=None,
            ssl_certfile=certificate, ssl_keyfile=key,
        )
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Listening(listener.getsockname()[1], certificate)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def ended_after_s(connection: socket.socket) -> float:
    """How long until the other end closes."""
    began_s = time.monotonic()
    with connection, contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return time.monotonic() - began_s


def test_a_handshake_has_its_time(listening: Listening) -> None:
    stranger = listening.silent()
    assert listening.ask() == 200
    assert 0.5 < ended_after_s(stranger) < 5


def test_silent_handshakes_lock_nobody_out(listening: Listening) -> None:
    strangers = [listening.silent() for _ in range(30)]
    began_s = time.monotonic()
    assert listening.ask() == 200
    assert time.monotonic() - began_s < 0.8  # before their time is up
    # connections are bounded: those that came first are ended at once
    assert sum(ended_after_s(stranger) < 0.2 for stranger in strangers[:20]) >= 20 - 8
    for stranger in strangers[20:]:
        ended_after_s(stranger)


def test_one_that_speaks_no_tls_is_ended(listening: Listening) -> None:
    stranger = listening.silent()
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert ended_after_s(stranger) < 0.8
    assert listening.ask() == 200


def test_the_end_of_a_server_ends_handshakes(listening: Listening) -> None:
    listening.silent()  # the fixture sees the server end


def test_idle_clients_do_not_hold_up_the_end_of_a_server(listening: Listening) -> None:
    listening.idle = listening.keep_alive()  # open until the fixture has seen the server end
    listening.idle.request("GET", "/")
    assert listening.idle.getresponse().read() == b"ok"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_server_sleeps_until_it_is_to_end(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_DATE_S", 3600.0)
    server = Server(uvicorn.Config(app, loop=loop, lifespan="off", log_config=None))  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = listener.getsockname()[1]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=8)) as client:
        client.request("GET", "/")
        assert client.getresponse().getheader("date")
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_burst_of_connections_is_taken_in_while_turns_of_the_loop_are_long() -> None:
    """Those that came first ask again and again; nobody waits for as many turns as there were connections before it."""
    answered: list[int] = []  # by whom, in order
    count = 40

    async def busy(scope: Any, receive: Any, send: Any) -> None:
        answered.append(int(scope["path"][1:]))
        time.sleep(0.002)
        await app(scope, receive, send)

    server = Server(uvicorn.Config(busy, http=bounded(RouterConfig()), loop="uvloop", lifespan="off", log_config=None))
    listener = socket.create_server(("127.0.0.1", 0), backlog=count)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(count)]
            for number, client in enumerate(clients):
                client.sendall(b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n" % number * 12)  # as good as asking again at once
            deadline_s = time.monotonic() + 15
            while len(set(answered)) < count and time.monotonic() < deadline_s:
                time.sleep(0.01)
        firsts = [answered.index(number) for number in range(count)]
    finally:
        server.should_exit = True
        thread.join()
    assert max(firsts) < 8 * count  # of 12 * count
