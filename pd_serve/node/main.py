"""A node from its settings to its running processes: model found, port taken, engine started, then the server.

Called by the command line. The engine takes longest to start, so it is started before the server's own
modules are even imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from urllib.parse import urlsplit

from pd_serve import logs, preflight, tracing
from pd_serve.config import EngineConfig, NodeConfig
from pd_serve.errors import ConfigError
from pd_serve.memory.choice import choose
from pd_serve.memory.switches import resolve as resolve_memory
from pd_serve.memory.visible import count_gpus, need_gpus
from pd_serve.models.source import ModelFiles, resolve
from pd_serve.net import listen, netloc, reachable_host
from pd_serve.node.engine_process import EngineProcess
from pd_serve.transfer.session.tls import Tls
from pd_serve.trust import server_tls


def run(config: NodeConfig, *, engine_command: list[str] | None = None) -> int:
    """Serves until a signal; the exit status. Raises PDServeError. ``engine_command``: another engine, for tests."""
    logs.configure(config.log_level, config.role, form=config.log_format)
    chosen = choose(config.device)
    config = replace(config, device=chosen.device)
    if config.device == "cuda":
        need_gpus(config.tp, count_gpus())
    preflight.check(config)
    tracing.check(config.otlp_traces_endpoint)
    config.check_door(config.host)
    if config.peer_host:
        config.check_door(config.peer_host, "peer_host")
    server_tls(config.ssl_certfile, config.ssl_keyfile)
    Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca)  # what the engine will do
    model = resolve(config.model, config.dtype, config.load_format, device=config.device)
    chosen.log()
    listener = listen(config.host, config.port)
    scheme = "https" if config.ssl_certfile else "http"
    url = config.advertise_url or f"{scheme}://{netloc(reachable_host(config.host), listener.getsockname()[1])}"
    engine = EngineProcess(config.engine_timeout_s)
    try:
        engine_config = make_engine_config(config, model, url, engine)
        engine.start(engine_config, command=engine_command)
        from pd_serve.node.server import Node

        traces = tracing.begin(config.otlp_traces_endpoint, "pd-serve-node", engine_config.node_id)
        return Node(engine_config, engine, url, traces).run(listener)
    finally:
        engine.close()
        listener.close()


def make_engine_config(config: NodeConfig, model: ModelFiles, url: str, engine: EngineProcess) -> EngineConfig:
    """The engine's settings with nothing left to decide."""
    allowed = os.sched_getaffinity(0)
    missing = set(config.cpus) - allowed
    if missing:
        raise ConfigError(
            f"--cpus names cores that this process may not use: {sorted(missing)}, not of {sorted(allowed)}"
        )
    memory = resolve_memory(config.enable_cumem_allocator, config.enable_sleep_mode, on_gpu=config.device == "cuda")
    resolved = {
        "model": str(model.directory),
        "served_model_name": config.served_model_name or model.name,
        "dtype": model.dtype,
        "load_format": model.load_format,
        "threads": config.threads or len(config.cpus) or len(allowed),
        "peer_host": config.peer_host or reachable_host(config.host),
        "secret": config.node_secret(),
        "secret_file": "",
        "enable_cumem_allocator": memory.enable_cumem_allocator,
        "enable_sleep_mode": memory.enable_sleep_mode,
    }
    return EngineConfig(
        **(vars(config) | resolved),
        node_id=urlsplit(url).netloc,
        address=engine.address,
        pulse_address=engine.pulse_address,
        template=config.chat_template_text(),
    )
