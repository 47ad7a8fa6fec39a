"""What one router process needs to know, resolved. Made by :mod:`pd_serve.router.main` from the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    api_keys: frozenset[str] = frozenset()  # empty: none needed
    min_prefill: int = 1  # for /ready
    min_decode: int = 1
    request_timeout_s: float = 600.0  # without any progress
    max_attempts: int = 4  # of one sequence, when nodes fail under it
    max_body_bytes: int = 8 << 20
    # A supervisor starts a dead node again within seconds; requests wait that long for one.
    node_wait_s: float = 5.0
    # Silence of a link, answers to pings included: the node is stopped, cut off, or dead.
    link_timeout_s: float = 4.0
    # Silence of the engine behind a node that still answers pings. A step may take seconds on a busy CPU.
    engine_timeout_s: float = 15.0
    drain_timeout_s: float = 30.0
    log_level: str = "info"
