"""``/v1/status`` and ``/v1/models`` as documents. Pure functions of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pd_serve.router.groups import Group, Registry
from pd_serve.router.links import Unlinked
from pd_serve.router.nodes import Node


def models(registry: Registry, created_s: int) -> list[dict[str, Any]]:
    """The models that have nodes."""
    found = []
    for name in registry.names():
        group = registry.find(name)
        if group is not None:
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


def describe(registry: Registry, unlinked: Sequence[Unlinked]) -> dict[str, Any]:
    """``unlinked``: nodes that are known but not linked."""
    troubles = {id: trouble for group in registry.groups.values() for id, trouble in group.troubles().items()}
    nodes = []
    for node in sorted(registry.nodes(), key=lambda n: (n.role, n.id)):
        group = registry.group(node.hello.model)
        known = group.known_prefixes(node) if group is not None else 0
        nodes.append({**_node(node, *state(node, troubles)), "known_prefixes": known})
    nodes += [{"url": entry.url, "state": entry.state, "reason": entry.reason} for entry in unlinked]
    return {"models": [_group(group) for group in registry.groups.values()], "nodes": nodes}


def state(node: Node, troubles: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """What a linked node is, and why if it gets no requests."""
    return ("draining", "") if node.load.draining else troubles.get(node.id, ("ready", ""))


def _group(group: Group) -> dict[str, Any]:
    prefill, decode = group.serving()
    return {
        "name": group.info.name,
        "fingerprint": group.info.fingerprint,
        "max_model_len": group.info.max_model_len,
        "prefill": prefill,
        "decode": decode,
        "waiting_for_a_node": len(group.waiting),
        "waiting_for_room": len(group.line),
        "unfit_pairs": [
            {"prefill": prefill, "decode": decode, "reason": reason}
            for (prefill, decode), reason in group.unfit(due=True).items()
        ],
    }


def _node(node: Node, state: str, reason: str) -> dict[str, Any]:
    hello = node.hello
    return {
        "id": node.id,
        "role": node.role,
        "url": node.url,
        "state": state,
        "reason": reason,
        "model": hello.model.name,
        "fingerprint": hello.model.fingerprint,
        "max_model_len": hello.model.max_model_len,
        "layout": hello.layout,
        "epoch": hello.epoch,
        "transport": hello.transport,
        "peer_addresses": hello.peer_addresses,
        "local_prefill_tokens": hello.local_prefill_tokens,
        "prompt_tokens_a_second": round(node.tokens_a_second),
        "in_flight": len(node.attempts),
        "load": msgspec.to_builtins(node.load),
        "counters": node.counters,
        "memory": msgspec.to_builtins(node.memory),
    }
