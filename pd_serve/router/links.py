"""One link a node: connected, greeted, watched, and connected again for nodes of the static list.

Owns the WebSockets. Registered nodes are forgotten when their link ends and come back by registering again.
A link that is silent for too long (the node answers no ping, or its engine no longer speaks) counts as lost:
what ran there goes on elsewhere, and what such a node still says later is never read.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import urllib.request
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from pd_serve.api.text_model import TextModel
from pd_serve.config import RouterConfig
from pd_serve.errors import PDServeError
from pd_serve.router.nodes import Node, Registry
from pd_serve.router.websocket import WebSocket, connect
from pd_serve.wire import link as wire
from pd_serve.wire.model import decode_bundle

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_MODEL_TIMEOUT_S = 30.0
_BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0)  # the last one for ever
_REFUSED_BACKOFF_S = (*_BACKOFF_S, 5.0, 10.0, 30.0, 60.0)  # for a node that answers and cannot be worked with
_TICK_S = 0.5
_PING_AFTER_S = 1.0
_STALL_S = 2.0  # a tick so late means that the router itself slept: no verdict on others then


class _Unfit(PDServeError):
    """The node and this router cannot work together; trying again will not help soon."""


class Unlinked(NamedTuple):
    url: str
    state: str
    reason: str


@dataclass
class _Link:
    url: str
    static: bool
    task: asyncio.Task[None] | None = None
    socket: WebSocket | None = None
    node: Node | None = None
    spoke_s: float = 0.0  # when the engine was last heard: a status or outputs
    state: str = "connecting"
    reason: str = ""  # why the last try failed
    refused: bool = False  # the node was there, and it and this router cannot work together


class Links:
    def __init__(self, settings: RouterConfig, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self._links: dict[str, _Link] = {}
        self._complaints: dict[str, str] = {}
        self._tick_s = time.monotonic()
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())
        for url in (*self._settings.prefill, *self._settings.decode):
            self.add(url, static=True)

    async def close(self) -> None:
        tasks = [task for entry in self._links.values() if (task := entry.task) is not None]
        tasks += [self._watcher] if self._watcher is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, url: str, *, static: bool = False) -> str:
        """Begins a link unless there is one; its state."""
        url = url.rstrip("/")
        entry = self._links.get(url)
        if entry is None:
            entry = self._links[url] = _Link(url, static)
            entry.task = asyncio.create_task(self._keep(entry))
        return entry.state

    def remove(self, url: str) -> bool:
        """A node leaves. Static ones are tried again, they may come back."""
        entry = self._links.get(url.rstrip("/"))
        if entry is None:
            return False
        if entry.socket is not None:
            entry.socket.close("the node left")
        elif not entry.static and entry.task is not None:
            entry.task.cancel()
        return True

    def unlinked(self) -> list[Unlinked]:
        """Nodes that are known and not linked."""
        return [Unlinked(e.url, e.state, e.reason) for e in self._links.values() if e.node is None]

    # --- one link -------------------------------------------------------------------------------------

    async def _keep(self, entry: _Link) -> None:
        failures = 0
        try:
            while True:
                linked = await self._once(entry)
                if not entry.static and not entry.refused:
                    return  # it comes back by registering; one that was refused would only be refused more often
                failures = 0 if linked else failures + 1
                backoff_s = _REFUSED_BACKOFF_S if entry.refused else _BACKOFF_S
                delay_s = backoff_s[min(failures, len(backoff_s) - 1)]
                await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))
        finally:
            if self._links.get(entry.url) is entry:
                del self._links[entry.url]

    async def _once(self, entry: _Link) -> bool:
        """Connects and serves until the link ends; whether it was ever in use."""
        if not entry.refused:
            entry.state = "connecting"  # else the reason stays readable while it is tried again
        hello: asyncio.Future[wire.Hello] = asyncio.get_running_loop().create_future()
        socket = None
        why = "the router ends"
        try:
            socket = await connect(
                entry.url, "/link", lambda data: self._received(entry, hello, data), _CONNECT_TIMEOUT_S
            )
            entry.socket = socket
            greeting = await self._greeting(hello, socket)
            await self._prepare(greeting, entry.url)
            if socket.closed.done():
                raise ConnectionError(socket.closed.result())
            entry.node = Node(greeting, lambda message: socket.send(wire.encoder.encode(message)))
            entry.spoke_s = time.monotonic()
            entry.state, entry.reason, entry.refused = "linked", "", False
            self._complaints.pop(entry.url, None)
            self._registry.add(entry.node)
            log.info("%s node %s linked at %s", greeting.role, greeting.node_id, entry.url)
            why = await socket.closed
            return True
        except (OSError, _Unfit, PDServeError, msgspec.DecodeError) as error:
            entry.reason = str(error) or type(error).__name__
            entry.refused = not isinstance(error, OSError)
            entry.state = "refused" if entry.refused else "unreachable"
            self._complain(entry, entry.reason)
            return False
        finally:
            node, entry.node, entry.socket = entry.node, None, None
            if node is not None:
                log.info("%s node %s unlinked: %s", node.role, node.id, why)
                self._registry.remove(node, why)
            if socket is not None:
                socket.close(why)

    def _complain(self, entry: _Link, what: str) -> None:
        """Once for each cause: a node registers every few seconds."""
        if self._complaints.get(entry.url) != what:
            if len(self._complaints) > 1000:
                self._complaints.clear()
            self._complaints[entry.url] = what
            log.warning("cannot link to the node at %s: %s", entry.url, what)

    async def _greeting(self, hello: asyncio.Future[wire.Hello], socket: WebSocket) -> wire.Hello:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await asyncio.wait((hello, socket.closed), return_when=asyncio.FIRST_COMPLETED)
        if not hello.done():
            raise ConnectionError(socket.closed.result())
        greeting = hello.result()
        if greeting.link_version != wire.LINK_VERSION:
            raise _Unfit(
                f"it speaks version {greeting.link_version} of the link, this router {wire.LINK_VERSION}: "
                "update the older of the two"
            )
        if greeting.role not in ("prefill", "decode"):
            raise _Unfit(f"its role '{greeting.role}' is unknown to this router: update the router")
        return greeting

    async def _prepare(self, greeting: wire.Hello, url: str) -> None:
        """The model's text side is there, and no stale link of the same node is."""
        old = self._registry.get(greeting.node_id)
        if old is not None:
            if old.hello.epoch == greeting.epoch:
                raise _Unfit(f"node {greeting.node_id} is linked already, under another URL: list it once")
            self._registry.remove(old, "it linked anew")
        if not self._registry.knows(greeting.model):
            started_s = time.monotonic()
            text = await asyncio.to_thread(_fetch_text_model, url, greeting.model)
            self._registry.add_group(text)
            log.info("tokenizer of '%s' loaded in %.2f s", greeting.model.name, time.monotonic() - started_s)

    def _received(self, entry: _Link, hello: asyncio.Future[wire.Hello], data: bytes) -> None:
        try:
            message = wire.decode_from_node(data)
        except msgspec.DecodeError as error:
            log.warning("the node at %s sent what is not a message: %s", entry.url, error)
            if entry.socket is not None:
                entry.socket.close("not a message")
            return
        node = entry.node
        now_s = time.monotonic()
        entry.spoke_s = now_s
        match message:
            case wire.Outputs() if node is not None:
                node.outputs(message.items, now_s)
            case wire.Status() if node is not None:
                self._registry.status(node, message)
            case wire.Hello() if not hello.done():
                hello.set_result(message)

    # --- silence --------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        self._tick_s = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            stalled = now_s - self._tick_s > _TICK_S + _STALL_S
            self._tick_s = now_s
            for entry in list(self._links.values()):
                if entry.socket is not None and entry.node is not None:
                    self._check(entry, entry.socket, entry.node, now_s, forgive=stalled)

    def _check(self, entry: _Link, socket: WebSocket, node: Node, now_s: float, *, forgive: bool) -> None:
        if forgive:
            # What the node sent while this process slept is still unread.
            socket.heard_s = entry.spoke_s = now_s
        silent_s = now_s - socket.heard_s
        if silent_s > self._settings.link_timeout_s:
            socket.abort(f"silent for {silent_s:.1f} s")
        elif now_s - entry.spoke_s > self._settings.engine_timeout_s:
            socket.abort(f"its engine was silent for {now_s - entry.spoke_s:.1f} s")
        elif node.running is not None and node.running.seconds > node.running.limit_s:
            socket.abort(f"its engine hangs: step {node.running.step} has run for {node.running.seconds:.1f} s")
        elif silent_s > _PING_AFTER_S:
            socket.ping()


def _fetch_text_model(url: str, info: wire.ModelInfo) -> TextModel:
    """Blocking. Raises OSError or ModelError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/model", timeout=_MODEL_TIMEOUT_S) as answer:
        return TextModel(decode_bundle(answer.read()), info)
