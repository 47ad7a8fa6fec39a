"""A node process with a scripted engine, and a router's end of a link to it."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from pd_serve.auth import Seal
from pd_serve.wire import link
from pd_serve.wire.handshake import RouterHalf
from tests.nursery import Started

# Making a client costs more CPU than twenty requests. A connection for each request, as of strangers.
HTTP = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


class RouterEnd:
    """A router's end of a link."""

    def __init__(self, connection: ClientConnection, secret: str = "") -> None:
        self.connection = connection
        half = RouterHalf(secret.encode())
        connection.send(half.greeting)
        connection.send(half.prove(connection.recv(timeout=5, decode=False)))
        self._outgoing: Seal = half.outgoing
        self._incoming: Seal = half.incoming

    def send(self, frame: bytes | str) -> None:
        self.connection.send(frame if isinstance(frame, str) else self._outgoing.close(frame))

    def recv(self, timeout_s: float = 5.0) -> bytes:
        frame = self._incoming.open(self.connection.recv(timeout=timeout_s, decode=False))
        assert frame is not None, "the node's MAC does not hold"
        return frame

    def close(self) -> None:
        self.connection.close()


class NodeUnderTest:
    def __init__(self, process: Started, port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._links = contextlib.ExitStack()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self, timeout_s: float = 10.0) -> int:
        return self.process.wait(timeout_s)

    def get(self, path: str) -> httpx.Response:
        return HTTP.get(self.url + path, timeout=5)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return HTTP.post(self.url + path, timeout=30, **options)

    def status(self) -> dict[str, object]:
        return dict(self.get("/v1/status").json())

    def counters(self) -> dict[str, float]:
        counters = self.status()["counters"]
        assert isinstance(counters, dict)
        return counters

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"not seen: {what}; the node says:\n{self.log}")

    def until_ready(self) -> None:
        self.until(lambda: self.get("/ready").status_code == 200, "ready")

    def dial(self, **options: Any) -> ClientConnection:
        """A WebSocket on which nothing was said yet."""
        url = self.url.replace("http", "ws") + "/link"
        return self._links.enter_context(connect(url, max_size=None, **options))

    def link(self, secret: str = "", **options: Any) -> RouterEnd:
        """A link whose ends have proved themselves; the next frame is the node's Hello."""
        return RouterEnd(self.dial(**options), secret)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._links.close()


StartNode = Callable[..., NodeUnderTest]


def receive(connection: RouterEnd, timeout_s: float = 5.0) -> link.FromNode:
    return link.decode_from_node(connection.recv(timeout_s))


def receive_outputs(connection: RouterEnd, name: str) -> list[int]:
    """The tokens of one attempt, until it finishes; everything else is skipped."""
    tokens: list[int] = []
    while True:
        message = receive(connection)
        for item in message.items if isinstance(message, link.Outputs) else []:
            assert item.id == name, "an output of another router's attempt"
            assert item.index == len(tokens)
            tokens += item.tokens
            if item.finish:
                return tokens


def submit(name: str, tokens: list[int]) -> bytes:
    params = link.SamplingParams(max_tokens=len(tokens), seed=0)
    return link.encoder.encode(link.Submit(name, array("i", tokens).tobytes(), 0, params))
