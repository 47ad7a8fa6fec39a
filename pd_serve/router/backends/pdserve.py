"""A node of pd-serve: one WebSocket, on which both ends prove that they know the secret before either says anything.

What a node says afterwards is checked before anything is made of it. Every token of every stream passes here.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import time
from typing import TypeVar

import msgspec

from pd_serve.config import RouterConfig
from pd_serve.errors import PDServeError
from pd_serve.router.backends.base import Place, Unfit
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.router.websocket import WebSocket, connect
from pd_serve.trust import client_tls
from pd_serve.wire import link as wire
from pd_serve.wire.handshake import BROKEN_SEAL, LinkRefused, RouterHalf
from pd_serve.wire.model import ModelBundle, decode_bundle

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class _Impossible(PDServeError):
    """A node said what cannot be."""


class PDServe:
    """The backend."""

    def __init__(self, settings: RouterConfig, registry: Registry, secret: bytes) -> None:
        self._settings = settings
        self._registry = registry
        self._secret = secret

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return client_tls(self._settings.ssl_ca)

    async def open(self, place: Place) -> NodeLink:
        link = NodeLink(place.url, self._registry, self._secret, self._settings.model_timeout_s)
        timeout_s = self._settings.connect_timeout_s
        socket = await connect(
            place.url, "/link", link.received, timeout_s, self._tls if place.url.startswith("https:") else None
        )
        try:
            await link.greet(socket, timeout_s)
        except BaseException as error:
            socket.close(str(error))
            raise
        return link


class NodeLink:
    """See :class:`pd_serve.router.backends.base.Link`."""

    hello: wire.Hello
    patience = 1.0

    def __init__(self, url: str, registry: Registry, secret: bytes, model_timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.spoke_s = 0.0
        self._url = url
        self._registry = registry
        self._model_timeout_s = model_timeout_s
        self._half = RouterHalf(secret)
        self._proved = False  # the node knows the secret: its frames are sealed from here on
        self._failed = False  # nothing that it says is read any more
        self._role: wire.Role | None = None  # it has changed since its hello
        self._greeted: asyncio.Future[wire.Hello] = loop.create_future()
        self._model: asyncio.Future[bytes] = loop.create_future()
        self._node: Node | None = None  # while the link is in use
        self._socket: WebSocket

    async def greet(self, socket: WebSocket, timeout_s: float) -> None:
        self._socket = socket
        self.closed = socket.closed
        socket.send(self._half.greeting)
        self.hello = await self._said(self._greeted, timeout_s)

    async def bundle(self) -> ModelBundle:
        self.send(wire.GetModel())
        encoded = await self._said(self._model, self._model_timeout_s)
        return decode_bundle(encoded)

    def begin(self, node: Node) -> None:
        self._node = node
        self.spoke_s = time.monotonic()
        if self._role is not None:
            self._registry.role(node, self._role)

    def send(self, message: wire.ToNode) -> None:
        self._socket.send(self._half.outgoing.close(wire.encoder.encode(message)))

    @property
    def heard_s(self) -> float:
        return self._socket.heard_s

    @heard_s.setter
    def heard_s(self, at_s: float) -> None:
        self._socket.heard_s = at_s

    def ping(self) -> None:
        self._socket.ping()

    def close(self, why: str) -> None:
        self._socket.close(why)

    def abort(self, why: str) -> None:
        self._socket.abort(why)

    async def _said(self, what: asyncio.Future[_T], timeout_s: float) -> _T:
        """Raises OSError when the link ends first, or nothing comes; Unfit when the node refuses."""
        async with asyncio.timeout(timeout_s):
            await asyncio.wait((what, self.closed), return_when=asyncio.FIRST_COMPLETED)
        if what.done():
            return what.result()
        if self._socket.refused:
            raise Unfit(self.closed.result())
        raise ConnectionError(self.closed.result())

    # --- what the node says -----------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        if self._failed:
            return
        try:
            self._take(data)
        except (LinkRefused, _Impossible, msgspec.DecodeError) as error:
            self._failed = True
            if not self._greeted.done():
                self._greeted.set_exception(error)
                self._greeted.exception()  # nobody may be waiting
            else:
                log.warning("the node at %s said what cannot be: %s", self._url, error)
            self._socket.close(str(error))

    def _take(self, data: bytes) -> None:
        """Raises LinkRefused, _Impossible or DecodeError for what ends the link."""
        if not self._proved:
            proof = self._half.prove(data)
            self._proved = True
            self._socket.send(proof)
            return
        frame = self._half.incoming.open(data)
        if frame is None:
            raise _Impossible(BROKEN_SEAL)
        message = wire.decode_from_node(frame)
        node = self._node
        now_s = time.monotonic()
        self.spoke_s = now_s
        match message:
            case wire.Outputs() if node is not None:
                _check_outputs(message.items, node.hello.model.vocab_size)
                node.outputs(message.items, now_s)
            case wire.Status() if node is not None:
                self._registry.status(node, message)
            case wire.Prefixes() if node is not None:
                try:
                    self._registry.cached(node, message)
                except ValueError as error:
                    raise _Impossible(str(error)) from None
            case wire.Role() if node is not None:
                self._registry.role(node, message)
            case wire.Role():
                self._role = message
            case wire.Hello() if not self._greeted.done():
                self._greeted.set_result(message)
            case wire.Model() if self._greeted.done() and not self._model.done():
                self._model.set_result(message.bundle)


def _check_outputs(items: list[wire.Output], vocab_size: int) -> None:
    """Beyond what types say (see :mod:`pd_serve.wire.link`): tokens are of the vocabulary. Raises _Impossible."""
    for item in items:
        if item.tokens and max(item.tokens) >= vocab_size:
            raise _Impossible(f"token {max(item.tokens)} of a vocabulary of {vocab_size}")
        if item.stop_token is not None and item.stop_token >= vocab_size:
            raise _Impossible(f"stop token {item.stop_token} of a vocabulary of {vocab_size}")
        if item.logprobs is None and item.prompt_logprobs is None:
            continue
        for entries in (item.logprobs, item.prompt_logprobs):
            for entry in entries or ():
                if entry is not None and max((entry.token, *(id for id, _ in entry.top))) >= vocab_size:
                    raise _Impossible(f"log-probability of a token outside of the vocabulary of {vocab_size}")
