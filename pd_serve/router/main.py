"""The router process: settings to a bound port, then serve until a signal, then drain.

Called by the command line. Must be up in well under a second: it imports neither torch nor transformers, and
nothing here may begin to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType

from pd_serve import logs
from pd_serve.config import RouterConfig
from pd_serve.net import end_unread, listen, netloc
from pd_serve.router import discovery
from pd_serve.trust import client_tls, is_loopback, server_tls

log = logging.getLogger(__name__)

_GRACE_S = 2.0  # beyond the drain: for error events to be written


def run(settings: RouterConfig) -> int:
    """Serves until SIGTERM or SIGINT; the exit status. Raises ConfigError when the port is taken."""
    logs.configure(settings.log_level, "router", access_log=settings.access_log)
    check(settings)
    listeners = [listen(settings.host, settings.port)]
    if (admin := settings.admin_address()) is not None:
        listeners.append(listen(*admin, "--admin-host or --admin-port"))
    end_unread(listeners[0], settings.request_timeout_s)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the engines' cores
    scheme = "https" if settings.ssl_certfile else "http"
    for listener, purpose in zip(listeners, ("", " for /metrics, /v1/status and /dashboard"), strict=False):
        log.info("listening on %s://%s%s", scheme, netloc(*listener.getsockname()[:2]), purpose)
    _serve(settings, listeners)
    log.info("ended")
    return 0


def _serve(settings: RouterConfig, listeners: list[socket.socket]) -> None:
    import uvicorn

    from pd_serve.http import bounded
    from pd_serve.http_server import Server
    from pd_serve.router.app import Router, create_app

    app = create_app(settings)
    router: Router = app.state.router

    class Draining(Server):
        """The first signal drains, a SIGTERM after ``drain_delay_s``; the second ends every stream with an error event.

        The exit status is 0.
        """

        signals = 0

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in kept.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.signals += 1
            if self.signals == 1 and sig == signal.SIGTERM and settings.drain_delay_s and self.loop is not None:
                router.begin_leaving()
                self.loop.call_soon_threadsafe(self.loop.call_later, settings.drain_delay_s, self._leave)
            else:
                self._leave()

        def _leave(self) -> None:
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            router.begin_drain()
            seen = self.signals

            def look() -> None:
                if self.signals > seen:
                    router.end_all()
                else:
                    router.shared.clock.call_later(0.1, look)

            look()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        http=bounded(settings),
        ws="none",
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile or None,
        ssl_keyfile=settings.ssl_keyfile or None,
        timeout_keep_alive=int(settings.keep_alive_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s + _GRACE_S),
    )
    Draining(config).run(sockets=listeners)


def check(settings: RouterConfig) -> None:
    """Raises ConfigError for doors that would be open by mistake; says which are open on purpose."""
    settings.check_nodes()
    for where in settings.discover:
        discovery.check(where)
    server_tls(settings.ssl_certfile, settings.ssl_keyfile)
    if settings.ssl_ca:
        client_tls(settings.ssl_ca)
    public = not is_loopback(settings.host)
    if public and not settings.api_keys():
        log.warning("whoever reaches %s can use the API: give --api-key-file to ask for keys", settings.host)
    if settings.node_secret():
        return
    if settings.allow_insecure_nodes:
        log.warning("--allow-insecure-nodes: whoever reaches %s can register nodes and read prompts", settings.host)
    else:
        log.info("without a secret only nodes of this machine are taken: give --secret-file for others")
