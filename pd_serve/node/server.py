"""The node's life on its event loop: starting, serving, draining, ending; and what it says of itself.

Made by :mod:`pd_serve.node.main`. Owns the HTTP server, the links, the registration and the signals; the
engine process is lent to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import uvicorn
import uvloop

from pd_serve import __version__
from pd_serve.auth import admin_token
from pd_serve.config import EngineConfig
from pd_serve.errors import PDServeError
from pd_serve.grammar.forms import missing
from pd_serve.http import bounded
from pd_serve.http_server import Server
from pd_serve.node import links as codes
from pd_serve.node.app import build
from pd_serve.node.engine_process import EngineProcess
from pd_serve.node.links import Links
from pd_serve.node.role import Switch
from pd_serve.node.sleep import Sleep, State
from pd_serve.node.websocket import LinkProtocol
from pd_serve.trust import is_loopback
from pd_serve.wire.link import LINK_VERSION, MAX_FRAME_BYTES, Hello, Load, ModelInfo, Status
from pd_serve.wire.model import bundle_from_directory, encode_bundle, text_hash

if TYPE_CHECKING:
    from pd_serve.node.registration import Registration
    from pd_serve.otel import Tracing

log = logging.getLogger(__name__)


class _Server(Server):
    """Without uvicorn's signal handlers: the node drains before the server stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Node:
    def __init__(self, config: EngineConfig, engine: EngineProcess, url: str, tracing: Tracing | None = None) -> None:
        self._config = config
        self._tracing = tracing
        if tracing is not None:
            from pd_serve.node.spans import Spans

            engine.ended_attempt = Spans(tracing).record
        self._secret = config.secret.encode()
        self.engine = engine
        self.links = Links(self._secret, config.connect_timeout_s, lambda: self._bundle)
        self.draining = False
        self.switch = Switch(engine, self.links, config.role)
        self.sleep = Sleep(engine, self, config.drain_timeout_s) if config.enable_sleep_mode else None
        public = not is_loopback(config.host)
        self.order_token = admin_token(self._secret) if self._secret and public else ""
        if public and not self._secret:
            log.warning(
                "--allow-insecure-nodes: whoever reaches %s can give this node orders and requests", config.host
            )
        self._url = url
        self._registration: Registration | None = None
        self._stop = asyncio.Event()
        self._started_s = time.time()
        self._ready_s: float | None = None
        self._bundle = b""  # an encoded ModelBundle, once the engine is ready
        self._text = ""  # its hash

    def run(self, bound: socket.socket) -> int:
        """Serves on ``bound`` until a signal. Raises PDServeError when the engine fails or dies."""
        status: int = uvloop.run(self._run(bound))
        return status

    # --- what others may ask (see app.NodeState) ------------------------------------------------------

    def hello(self) -> Hello | None:
        ready = self.engine.ready
        if ready is None or self.why_not():
            return None
        return Hello(
            link_version=LINK_VERSION,
            node_id=self._config.node_id,
            role=self.switch.role,
            url=self._url,
            model=msgspec.structs.replace(ready.model, text=self._text),
            layout=ready.layout,
            epoch=ready.epoch,
            peer_addresses=ready.peer_addresses,
            transport=ready.transport,
            local_prefill_tokens=self._config.local_prefill_tokens,
            load=self._load() or ready.load,
            layout_text=ready.layout_text,
            grammars=not missing(),
        )

    def describe(self) -> dict[str, object]:
        ready = self.engine.ready
        status = self.engine.status
        engine: dict[str, object] = {
            "pid": self.engine.pid,
            "running": msgspec.to_builtins(self.engine.running),
            "trouble": self.engine.trouble,
        }
        if ready is not None:
            engine |= {
                "model": msgspec.to_builtins(ready.model),
                "layout": ready.layout_text,
                "layout_fingerprint": ready.layout,
                "epoch": ready.epoch,
                "peer_addresses": ready.peer_addresses,
                "transport": ready.transport,
                "start_s": ready.start_s,
            }
        return {
            "version": __version__,
            "node_id": self._config.node_id,
            "role": self.switch.role,
            "url": self._url,
            "pid": os.getpid(),
            "state": self._state(),
            "links": len(self.links),
            "dtype": self._config.dtype,
            "threads": self._config.threads,
            "started_at": self._started_s,
            "ready_at": self._ready_s,
            "engine": engine,
            "load": msgspec.to_builtins(self._load()),
            "memory": msgspec.to_builtins(status.memory) if status is not None else None,
            "sleep": msgspec.to_builtins(self.sleep.describe()) if self.sleep is not None else None,
            "counters": status.counters if status is not None else {},
        }

    def why_not(self) -> str:
        if self.draining:
            return "draining"
        if self.engine.ready is None or not self._bundle:
            return "starting"
        if self.sleep is not None and self._resting():
            return self.sleep.state.value
        if not self.engine.alive():
            return "the engine has ended"
        return self.engine.trouble

    def _read_bundle(self, model: ModelInfo) -> None:
        """What routers ask for. Reads files. Raises ModelError."""
        bundle = bundle_from_directory(
            self._config.model,
            name=model.name,
            fingerprint=model.fingerprint,
            chat_template=self._config.template,
            generation_config=self._config.generation_config,
        )
        encoded = encode_bundle(bundle)
        self._text, self._bundle = text_hash(encoded), encoded

    def _state(self) -> str:
        return "stuck" if self.engine.trouble and not self.draining else self.why_not() or "serving"

    def _load(self) -> Load | None:
        return self._marked(self.engine.status).load if self.engine.status is not None else None

    def _marked(self, status: Status) -> Status:
        """A status of the engine as it is now: with its step, and ``draining`` from the moment the node knows it."""
        status = msgspec.structs.replace(status, running=self.engine.running)
        if self.draining or self._resting():
            status.load = msgspec.structs.replace(status.load, draining=True)
        return status

    def _resting(self) -> bool:
        return self.sleep is not None and self.sleep.state is not State.AWAKE

    # --- routers (see sleep.Routers) ------------------------------------------------------------------

    def drain(self) -> None:
        self._tell_routers()

    def join(self) -> None:
        if self._config.router and self._registration is None and not self.draining:
            from pd_serve.node.registration import Registration  # a node without routers needs no HTTP client

            self._registration = Registration(
                self._config.router,
                self._url,
                self.links.lost,
                self.links.__len__,
                timeout_s=self._config.connect_timeout_s,
                secret=self._secret,
                ssl_ca=self._config.ssl_ca,
            )

    async def leave(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.leave()
        self.links.close(codes.TRY_AGAIN, "the node sleeps")

    # --- life -----------------------------------------------------------------------------------------

    async def _run(self, bound: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        self.engine.attach(loop, self.links.deliver, self._engine_changed)
        server = _Server(
            uvicorn.Config(
                build(self),
                http=bounded(self._config),
                ws=LinkProtocol,
                ws_max_size=MAX_FRAME_BYTES,
                ws_per_message_deflate=False,  # a local network is faster than zlib
                ws_ping_interval=self._config.router_timeout_s / 2,
                ws_ping_timeout=self._config.router_timeout_s,
                lifespan="off",
                log_config=None,
                access_log=False,
                date_header=False,  # for which it would wake up every second
                ssl_certfile=self._config.ssl_certfile or None,
                ssl_keyfile=self._config.ssl_keyfile or None,
                timeout_keep_alive=int(self._config.keep_alive_s),
                timeout_graceful_shutdown=1,
            )
        )
        serving = asyncio.create_task(server.serve([bound]))
        engine_end = asyncio.create_task(self.engine.wait_end())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await self._serve(engine_end, stop)
        finally:
            self.links.close(codes.GOING_AWAY, "the node ends")
            await self.links.closed()  # uvicorn would cut them off
            server.should_exit = True
            await self.engine.stop()
            await serving
            for task in (engine_end, stop):
                task.cancel()
            await asyncio.gather(engine_end, stop, return_exceptions=True)
            if self._tracing is not None:
                await self._tracing.close()
        log.info("ended")
        return 0

    async def _serve(self, engine_end: asyncio.Task[str], stop: asyncio.Task[bool]) -> None:
        ready = asyncio.create_task(self.engine.wait_ready())
        await asyncio.wait({ready, engine_end, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            ready.cancel()
            return
        started = await ready
        if started is None:
            raise PDServeError(self.engine.failure)
        await asyncio.to_thread(self._read_bundle, started.model)
        self._ready_s = time.time()
        log.info(
            "serving %s (%s) on %s, transport %s, up to %d tokens; engine started in %s",
            started.model.name,
            self._config.dtype,
            self._url,
            started.transport,
            started.model.max_model_len,
            ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in started.start_s.items()),
        )
        self.join()
        try:
            await asyncio.wait({engine_end, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not engine_end.done():
                await self._drain()
            if engine_end.done():
                self.links.close(codes.INTERNAL, "the engine died")
                raise PDServeError(f"the engine died ({engine_end.result()}); its last words are above")
        finally:
            if self._registration is not None:
                await self._registration.leave()

    async def _drain(self) -> None:
        self.draining = True
        if self._registration is not None:
            self._registration.stop()
        log.info("draining: at most %g s", self._config.drain_timeout_s)
        self.drain()
        if not await self.engine.drain(self._config.drain_timeout_s):
            load = self._load()
            left = f"{load.running + load.waiting} requests, {load.leases} leases" if load else "unknown work"
            log.warning("not drained after %g s: %s end now", self._config.drain_timeout_s, left)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("second signal: ending at once")
            self.engine.kill()
            os._exit(1)
        log.info("%s received", signal.Signals(number).name)
        self._stop.set()

    def _engine_changed(self) -> None:
        """Routers hear of it: also of a step that takes long, so that they know it for one. Or they lose the link."""
        if self.engine.trouble:
            self.links.close(codes.INTERNAL, self.engine.trouble)
        else:
            self._tell_routers()

    def _tell_routers(self) -> None:
        if self.engine.status is not None:
            self.links.broadcast(self._marked(self.engine.status), self.engine.submits)
