"""A node from its settings to its running processes: model found, port taken, engine started, then the server.

Called by the command line. The engine takes longest to start, so it is started before the server's own
modules are even imported.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pd_serve import logs, preflight
from pd_serve.config import NodeConfig
from pd_serve.errors import ConfigError
from pd_serve.memory.switches import resolve as resolve_memory
from pd_serve.models.source import ModelFiles, resolve
from pd_serve.net import listen, netloc, reachable_host
from pd_serve.node.engine_process import EngineProcess
from pd_serve.transfer.session.tls import Tls
from pd_serve.trust import server_tls
from pd_serve.wire.engine import EngineConfig

ENGINES_ON_GPU = False  # they compute on CPUs so far


def run(config: NodeConfig, *, engine_command: list[str] | None = None) -> int:
    """Serves until a signal; the exit status. Raises PDServeError. ``engine_command``: another engine, for tests."""
    logs.configure(config.log_level, config.role)
    preflight.check(config)
    config.check_door(config.host)
    if config.peer_host:
        config.check_door(config.peer_host, "peer_host")
    server_tls(config.ssl_certfile, config.ssl_keyfile)
    Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca)  # what the engine will do
    model = resolve(config.model, config.dtype, config.load_format)
    listener = listen(config.host, config.port)
    scheme = "https" if config.ssl_certfile else "http"
    url = config.advertise_url or f"{scheme}://{netloc(reachable_host(config.host), listener.getsockname()[1])}"
    engine = EngineProcess(config.engine_timeout_s)
    try:
        engine_config = make_engine_config(config, model, url, engine)
        engine.start(engine_config, command=engine_command)
        from pd_serve.node.server import Node

        return Node(config, engine_config, engine, url).run(listener)
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
    memory = resolve_memory(config.enable_cumem_allocator, config.enable_sleep_mode, on_gpu=ENGINES_ON_GPU)
    return EngineConfig(
        role=config.role,
        node_id=f"{config.role}@{urlsplit(url).netloc}",
        address=engine.address,
        pulse_address=engine.pulse_address,
        model=str(model.directory),
        served_name=config.served_model_name or model.name,
        dtype=model.dtype,
        load_format=model.load_format,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_memory,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queue=config.max_queue,
        max_queue_wait_s=config.max_queue_wait_s,
        local_prefill_tokens=config.local_prefill_tokens,
        threads=config.threads or len(config.cpus) or len(allowed),
        cpus=list(config.cpus),
        peer_host=config.peer_host or reachable_host(config.host),
        lease_s=config.lease_s,
        pull_timeout_s=config.pull_timeout_s,
        transport_timeout_s=config.transport_timeout_s,
        peer_handshake_s=config.peer_handshake_s,
        allow_insecure_nodes=config.allow_insecure_nodes,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_ca=config.ssl_ca,
        engine_timeout_s=config.engine_timeout_s,
        step_timeout_s=config.step_timeout_s,
        prefix_caching=config.prefix_caching,
        transport=config.transport,
        nixl_backend=config.nixl_backend,
        nixl_options=config.nixl_backend_options(),
        nvlink_socket_dir=config.nvlink_socket_dir,
        checksums=config.checksums,
        secret=config.node_secret(),
        enable_cumem_allocator=memory.enable_cumem_allocator,
        enable_sleep_mode=memory.enable_sleep_mode,
        pin_memory=config.pin_memory,
        log_level=config.log_level,
        chat_template=config.chat_template_text(),
        generation_config=config.generation_config,
    )
