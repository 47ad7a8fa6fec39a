"""Nodes make themselves known to routers: at start, after a router's restart, and when they leave."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.node.harness import StartNode
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


class Registry:
    """A router's ``/nodes``: keeps what it is told."""

    def __init__(self, port: int, status: int = 200, answer: bytes = b"{}") -> None:
        self.seen: list[tuple[str, str]] = []  # method, URL of the node
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def _take(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.command, body["url"]))
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_DELETE = _take

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, entry: tuple[str, str], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while entry not in self.seen:
            assert time.monotonic() < deadline_s, f"{entry} not in {self.seen}"
            time.sleep(0.01)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other process is given while nobody listens there; a server that reuses addresses may."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_registers_with_all_routers_and_leaves(start_node: StartNode) -> None:
    ports = free_port(), free_port()
    first, second = map(Registry, ports)
    node = start_node("echoes", "--router", ",".join(f"http://127.0.0.1:{port}" for port in ports))
    for registry in (first, second):
        registry.wait_for(("POST", node.url), 3)
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == 0
    for registry in (first, second):
        assert registry.seen[-1] == ("DELETE", node.url)
        registry.close()


def test_a_router_that_comes_later_or_again(start_node: StartNode) -> None:
    with reserved_port() as port:
        node = start_node("echoes", "--router", f"http://127.0.0.1:{port}", "--advertise-url", "http://example:81")
        node.until(lambda: "cannot register with router" in node.log, "a warning")
        first = Registry(port)
        first.wait_for(("POST", "http://example:81"), 4)
        first.close()
        second = Registry(port)
        second.wait_for(("POST", "http://example:81"), 8)
        second.close()
        node.until(lambda: f"router http://127.0.0.1:{port} is back" in node.log, "a word about its return")
        assert node.log.count("cannot register") == 1


def test_a_broken_link_is_mended_at_once(start_node: StartNode) -> None:
    port = free_port()
    registry = Registry(port)
    node = start_node("echoes", "--router", f"http://127.0.0.1:{port}")
    registry.wait_for(("POST", node.url), 3)
    connection = node.link()
    registry.seen.clear()
    connection.close()
    registry.wait_for(("POST", node.url), 2)  # long before the next regular one
    registry.close()


def test_a_router_that_is_gone_does_not_delay_the_end(start_node: StartNode) -> None:
    node = start_node("echoes", "--router", f"http://127.0.0.1:{free_port()}")
    started_s = time.monotonic()
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == 0
    assert time.monotonic() - started_s < 2


@pytest.mark.parametrize(
    ("answer", "logged"),
    [(b'{"error": {"message": "it is another secret"}}', "(it is another secret)"), (b"<html>", "(HTTP 403: <html>)")],
)
def test_why_a_router_refuses_is_in_the_log(start_node: StartNode, answer: bytes, logged: str) -> None:
    port = free_port()
    registry = Registry(port, 403, answer)
    node = start_node("echoes", "--router", f"http://127.0.0.1:{port}")
    node.until(lambda: logged in node.log, "the router's words")
    registry.close()
