"""Routers' links to this node: one WebSocket each, forwarded to and from the engine.

Called by the HTTP application (a link begins), by the engine process (frames for a link) and by the
node's main loop (status, closing). A router proves that it knows the secret before it hears anything of this node.
Frames are then forwarded as they came; a router can neither crash the node with garbage nor fill its memory by not
reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
from starlette.websockets import WebSocket, WebSocketDisconnect

from pd_serve.auth import TAG_BYTES, Seal
from pd_serve.node.engine_process import EngineProcess
from pd_serve.node.websocket import proved
from pd_serve.wire import link as wire
from pd_serve.wire.engine import NODE, Drop
from pd_serve.wire.handshake import BROKEN_SEAL, NO_GREETING, LinkRefused, NodeHalf

log = logging.getLogger(__name__)

# Thousands of tokens a second are a few MB: a router that is so far behind is stuck.
MAX_QUEUED_BYTES = 32 << 20
_CLOSE_WAIT_S = 1.0
_NODE = int.from_bytes(NODE, "little")

GOING_AWAY = 1001  # WebSocket close codes
POLICY = 1008
INTERNAL = 1011
TRY_AGAIN = 1013


class Link:
    """One proven router's connection. ``offer`` never waits; what it was given is sent in order."""

    def __init__(self, origin: int, websocket: WebSocket, outgoing: Seal, incoming: Seal) -> None:
        self.origin = origin
        self.has_model = False  # it asked for the model's text side
        self._websocket = websocket
        self._outgoing = outgoing
        self._incoming = incoming
        self._frames: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._max_queued_bytes = MAX_QUEUED_BYTES
        self._close = (GOING_AWAY, "")
        self.peer = _name(websocket)

    def offer(self, frame: bytes, *, is_model: bool = False) -> None:
        """``is_model``: it may be longer than all that else may wait."""
        if self._ended.is_set():
            return
        self._frames.append(frame)
        self._queued_bytes += len(frame)
        if is_model:
            self._max_queued_bytes += len(frame)
        if self._queued_bytes > self._max_queued_bytes:
            log.warning("router %s does not read: closing its link with %d bytes unsent", self.peer, self._queued_bytes)
            self._frames.clear()
            self.end(POLICY, "this router reads too slowly")
        self._wake.set()

    def end(self, code: int, reason: str) -> None:
        """Closes the link after what was offered before, without waiting long for a router that does not read."""
        if not self._ended.is_set():
            self._close = (code, reason)
            self._ended.set()
            self._wake.set()

    async def run(self, received: Callable[[Link, bytes], None]) -> None:
        """Sends and receives until either side ends it."""
        sender = asyncio.create_task(self._send())
        tasks = {sender, asyncio.create_task(self._receive(received)), asyncio.create_task(self._ended.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.is_set():
                await asyncio.wait({sender}, timeout=_CLOSE_WAIT_S)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await _close(self._websocket, *self._close)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, RuntimeError | OSError):
                log.error("the link of router %s failed", self.peer, exc_info=result)

    async def _send(self) -> None:
        while True:
            while self._frames:
                frame = self._frames.popleft()
                self._queued_bytes -= len(frame)
                await self._websocket.send_bytes(self._outgoing.close(frame))
            if self._ended.is_set():
                return
            self._wake.clear()
            await self._wake.wait()

    async def _receive(self, received: Callable[[Link, bytes], None]) -> None:
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            frame = message.get("bytes")
            if frame is None:
                self.end(POLICY, "frames must be binary")
                return
            opened = self._incoming.open(frame)
            if opened is None:
                log.warning("closing the link of router %s: %s", self.peer, BROKEN_SEAL)
                self.end(POLICY, BROKEN_SEAL)
                return
            received(self, opened)


class Links:
    """All links of the node; the numbers that the engine knows them by.

    ``bundle``: an encoded ModelBundle, for routers that have none of this model; empty before there is one.
    """

    def __init__(self, secret: bytes, connect_timeout_s: float, bundle: Callable[[], bytes]) -> None:
        self._secret = secret
        self._connect_timeout_s = connect_timeout_s
        self._bundle = bundle
        self._links: dict[int, Link] = {}
        self._origins = itertools.count(1)
        self._none = asyncio.Event()
        self._none.set()
        self.lost = asyncio.Event()  # a link ended; whoever waits for it clears it

    def __len__(self) -> int:
        return len(self._links)

    async def serve(
        self,
        websocket: WebSocket,
        hello: Callable[[], wire.Hello | None],
        why_not: Callable[[], str],
        engine: EngineProcess,
    ) -> None:
        """Runs one link, from its greeting to its end. The engine ends the attempts that came through it.

        ``hello``: how the node introduces itself, None while it takes no requests; ``why_not`` says why.
        """
        await websocket.accept()
        half = NodeHalf(self._secret)
        refusal = await self._prove(websocket, half)
        if refusal is not None:
            await _close(websocket, *refusal)
            return
        greeting = hello()
        if greeting is None:
            await _close(websocket, TRY_AGAIN, why_not())
            return
        proved(websocket)
        link = Link(next(self._origins), websocket, half.outgoing, half.incoming)
        link.offer(wire.encoder.encode(greeting))
        self._links[link.origin] = link
        self._none.clear()
        log.info("router %s linked", link.peer)
        try:
            await link.run(lambda _, frame: self._forward(link, frame, engine))
        finally:
            del self._links[link.origin]
            if not self._links:
                self._none.set()
            engine.tell(Drop(link.origin))
            self.lost.set()
            log.info("router %s unlinked", link.peer)

    async def _prove(self, websocket: WebSocket, half: NodeHalf) -> tuple[int, str] | None:
        """Each end shows the other that it knows the secret; close code and reason where that fails."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await websocket.send_bytes(half.challenge(await websocket.receive_bytes()))
                half.check(await websocket.receive_bytes())
        except LinkRefused as error:
            log.warning("refused the link of router %s: %s", _name(websocket), error)
            return POLICY, str(error)
        except KeyError:  # Starlette's word for a text frame
            return POLICY, NO_GREETING
        except TimeoutError:
            log.warning(
                "%s began a link and did not prove itself within %g s", _name(websocket), self._connect_timeout_s
            )
            return POLICY, NO_GREETING
        except (WebSocketDisconnect, RuntimeError, OSError):
            return GOING_AWAY, ""
        return None

    def _forward(self, link: Link, frame: bytes, engine: EngineProcess) -> None:
        try:
            message = wire.decode_to_node(frame)
        except msgspec.DecodeError as error:
            log.warning("router %s sent what is not a message (%s): closing its link", link.peer, error)
            link.end(POLICY, f"not a message: {error}")
            return
        if isinstance(message, wire.GetModel):
            self._send_model(link)
            return
        try:
            engine.send(_NODE if isinstance(message, wire.Peers) else link.origin, frame)
        except zmq.Again:
            log.error("the engine does not read: closing the link of router %s", link.peer)
            link.end(INTERNAL, "the engine does not read")

    def _send_model(self, link: Link) -> None:
        bundle = self._bundle()
        if not bundle or link.has_model:
            link.end(POLICY, "the model is sent once a link")
            return
        frame = wire.encoder.encode(wire.Model(bundle))
        if len(frame) > wire.MAX_FRAME_BYTES - TAG_BYTES:
            log.error("the model's tokenizer takes %d bytes, a frame at most %d", len(frame), wire.MAX_FRAME_BYTES)
            link.end(INTERNAL, "the model's tokenizer is too large for the link")
            return
        link.has_model = True
        link.offer(frame, is_model=True)

    def deliver(self, origin: int, frame: bytes) -> None:
        """A frame of the engine to the router it is for; to nobody if that router has gone."""
        link = self._links.get(origin)
        if link is not None:
            link.offer(frame)

    def broadcast(self, status: wire.Status, submits: dict[int, int]) -> None:
        """``submits``: by origin, the number of the last submit that the status includes."""
        for link in self._links.values():
            status.last_submit = submits.get(link.origin, 0)
            link.offer(wire.encoder.encode(status))

    def tell(self, message: wire.FromNode) -> None:
        """The same to every router."""
        frame = wire.encoder.encode(message)
        for link in self._links.values():
            link.offer(frame)

    def close(self, code: int, reason: str) -> None:
        for link in self._links.values():
            link.end(code, reason)

    async def closed(self) -> None:
        """After :meth:`close`: what was offered before is sent, and why they end, or routers do not read."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), 2 * _CLOSE_WAIT_S)


def _name(websocket: WebSocket) -> str:
    client = websocket.client
    return f"{client.host}:{client.port}" if client else "unknown"


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    reason = reason.encode()[:120].decode(errors="ignore")  # a close frame holds at most 123 bytes
    with contextlib.suppress(Exception):  # the router may be gone already
        await asyncio.wait_for(websocket.close(code, reason), _CLOSE_WAIT_S)
