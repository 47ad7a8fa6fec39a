"""``/v1/status`` and ``/v1/models`` as documents. Pure functions of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pd_serve.router.nodes import Group, Node, Registry


def models(registry: Registry, created_s: int) -> list[dict[str, Any]]:
    """The models that have nodes."""
    found = []
    for name in registry.names():
        group = registry.find(name)
        if group is not None and group.nodes():
            found.append(
                {
                    "id": name,
                    "object": "model",
                    "created": created_s,
                    "owned_by": "pd-serve",
                    "max_model_len": group.info.max_model_len,
                }
            )
    return found


def describe(registry: Registry, unlinked: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """``unlinked``: URL and state of nodes that are known but not linked."""
    nodes = [_node(node) for node in sorted(registry.nodes(), key=lambda n: (n.role, n.id))]
    nodes += [{"url": url, "state": state} for url, state in unlinked]
    return {"models": [_group(group) for group in registry.groups.values()], "nodes": nodes}


def _group(group: Group) -> dict[str, Any]:
    prefill, decode = group.serving()
    return {
        "name": group.info.name,
        "fingerprint": group.info.fingerprint,
        "max_model_len": group.info.max_model_len,
        "prefill": prefill,
        "decode": decode,
        "waiting_for_a_node": len(group.waiting),
    }


def _node(node: Node) -> dict[str, Any]:
    hello = node.hello
    return {
        "id": node.id,
        "role": node.role,
        "url": node.url,
        "state": "draining" if node.load.draining else "ready",
        "model": hello.model.name,
        "fingerprint": hello.model.fingerprint,
        "layout": hello.layout,
        "epoch": hello.epoch,
        "transport": hello.transport,
        "peer_address": hello.peer_address,
        "local_prefill_tokens": hello.local_prefill_tokens,
        "in_flight": len(node.attempts),
        "load": msgspec.to_builtins(node.load),
        "counters": node.counters,
        "memory": msgspec.to_builtins(node.memory),
    }
