"""The router process: settings to a bound port, then serve until a signal, then drain.

Called by the command line. Must be up in well under a second: it imports neither torch nor transformers, and
nothing here may begin to.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from typing import TYPE_CHECKING

from pd_serve import logs, tracing
from pd_serve.config import RouterConfig
from pd_serve.net import end_unread, listen, netloc
from pd_serve.router import discovery
from pd_serve.trust import client_tls, is_loopback, server_tls

if TYPE_CHECKING:
    from pd_serve.router.siblings import Siblings

log = logging.getLogger(__name__)

_YOUNG_OBJECTS = 10_000  # Python's own 700 are three requests
_GRACE_S = 2.0  # beyond the drain: for error events to be written


def run(settings: RouterConfig) -> int:
    """Serves until SIGTERM or SIGINT; the exit status. Raises ConfigError when the port is taken."""
    logs.configure(settings.log_level, "router", form=settings.log_format, access_log=settings.access_log)
    check(settings)
    settings.api_keys()  # what is wrong with their file is said before anybody can connect
    listeners = _listeners(settings)
    if settings.workers > 1:
        for listener in listeners:
            listener.close()  # nobody else's: those that share a port do not notice others that do
        of_each = [_listeners(settings, shared=True) for _ in range(settings.workers)]
        listeners = of_each[0]
    scheme = "https" if settings.ssl_certfile else "http"
    for listener, purpose in zip(listeners, ("", " for /metrics, /v1/status and /dashboard"), strict=False):
        log.info("listening on %s://%s%s", scheme, netloc(*listener.getsockname()[:2]), purpose)
    if settings.workers > 1:
        from pd_serve.router import workers

        workers.run(settings, of_each)
    else:
        serve(settings, listeners)
    log.info("ended")
    return 0


def _listeners(settings: RouterConfig, *, shared: bool = False) -> list[socket.socket]:
    """The clients', and the operators' where there is one."""
    found = [listen(settings.host, settings.port, shared=shared)]
    if (admin := settings.admin_address()) is not None:
        found.append(listen(*admin, "--admin-host or --admin-port", shared=shared))
    end_unread(found[0], settings.request_timeout_s)
    return found


def serve(settings: RouterConfig, listeners: list[socket.socket], siblings: Siblings | None = None) -> None:
    """One process, until a signal. ``siblings``: the others on the same port."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the engines' cores
    import uvicorn

    from pd_serve.http import bounded
    from pd_serve.router.app import create_app
    from pd_serve.router.ending import Draining

    instance = f"{socket.gethostname()}:{settings.port}/{os.getpid()}"
    traces = tracing.begin(settings.otlp_traces_endpoint, "pd-serve-router", instance)
    app = create_app(settings, siblings, traces)
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
    # What is here now stays, and of what requests make nearly nothing is left to the collector.
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
    Draining(config, app.state.router).run(sockets=listeners)


def check(settings: RouterConfig) -> None:
    """Raises ConfigError for doors that would be open by mistake; says which are open on purpose."""
    settings.check_nodes()
    tracing.check(settings.otlp_traces_endpoint)
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
