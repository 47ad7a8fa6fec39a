"""A node from its settings to its running processes: model found, port taken, engine started, then the server.

Called by the command line. The engine takes longest to start, so it is started before the server's own
modules are even imported.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from pd_serve import logs
from pd_serve.config import NodeConfig
from pd_serve.errors import ConfigError
from pd_serve.models.source import ModelSource, resolve
from pd_serve.node.engine_process import EngineProcess
from pd_serve.wire.engine import EngineConfig

log = logging.getLogger(__name__)

_WILDCARDS = ("0.0.0.0", "::", "")


def run(config: NodeConfig) -> int:
    """Serves until a signal or the engine's end; the process's exit status. Raises PDServeError."""
    logs.configure(config.log_level, config.role)
    model = resolve(config.model, load_format=config.load_format)
    listener = listen(config.host, config.port)
    advertise_url = config.advertise_url or f"http://{_reachable(config.host)}:{listener.getsockname()[1]}"
    engine_config = make_engine_config(config, model, advertise_url, "")
    engine = EngineProcess()
    try:
        engine.start(engine_config)
        from pd_serve.node.server import Node

        return Node(config, engine, engine_config, listener, advertise_url).run()
    finally:
        engine.close()
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that the port is known and ours before anything slow begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port") from error
    listener.listen(1024)
    return listener
