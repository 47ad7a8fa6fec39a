"""What the page is told once a second: nodes, lanes, streams and the newest point of the plots. Plain documents.

Never a prompt, a text or a key: ids, counts and times alone. A frame is bounded, however many nodes and streams
there are: what is wrong and what is busy comes first, and how many there are in all is said.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pd_serve.router.groups import Registry
from pd_serve.router.links import Unlinked
from pd_serve.router.nodes import Node
from pd_serve.router.status import state as state_of
from pd_serve.router.stream import Stream

MAX_NODES = 256
MAX_STREAMS = 100
MAX_PAIRS = 100
_PULLED = "pull_bytes_"  # of a decode node's counters: one for each lane
_TESTED = "self_test_bytes_"
_TESTED_S = "self_test_seconds_"


def frame(registry: Registry, unlinked: Sequence[Unlinked], streams: set[Stream], now_s: float) -> dict[str, Any]:
    """``now_s``: of the streams' clock."""
    troubles = {id: trouble for group in registry.groups.values() for id, trouble in group.troubles().items()}
    nodes = registry.nodes()
    states = {node.id: _state(node, troubles) for node in nodes}
    shown = heapq.nsmallest(MAX_NODES, nodes, key=lambda node: _rank(node, states[node.id][0]))
    # The shown ones are in an order that stays from second to second.
    shown.sort(key=lambda node: (node.role != "prefill", node.role, node.hello.model.name, node.id))
    unfit = [
        {"prefill": prefill, "decode": decode, "reason": reason}
        for group in registry.groups.values()
        for (prefill, decode), reason in group.unfit(due=True).items()
    ]
    oldest = heapq.nsmallest(MAX_STREAMS, streams, key=lambda stream: stream.created_s)
    counted = Counter((node.role, states[node.id][0]) for node in nodes)
    return {
        "nodes_total": len(nodes) + len(unlinked),
        "streams_total": len(streams),
        "waiting": sum(len(group.waiting) + len(group.line) for group in registry.groups.values()),
        "states": [{"role": role, "state": state, "nodes": count} for (role, state), count in sorted(counted.items())],
        "nodes": [_node(node, *states[node.id]) for node in shown],
        "unlinked": [entry._asdict() for entry in unlinked[:MAX_NODES]],
        "lanes": [lane for node in shown if node.decodes for lane in _lanes(node)],
        "unfit": unfit[:MAX_PAIRS],
        "streams": [{**stream.where(), "age_s": now_s - stream.created_s} for stream in oldest],
    }


def _state(node: Node, troubles: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    if node.memory is not None and node.memory.asleep:
        return "asleep", f"without memory: {', '.join(node.memory.asleep)}"
    running = node.running
    if running is not None and running.seconds > running.limit_s:
        return "hanging", f"a step of {running.tokens} tokens has run for {running.seconds:.0f} s"
    return state_of(node, troubles)


def _rank(node: Node, state: str) -> tuple[bool, int, str]:
    return state == "ready", -(node.load.running + node.load.waiting + node.load.pulling), node.id


def _node(node: Node, state: str, reason: str) -> dict[str, Any]:
    load = node.load
    fullest = max(load.groups, key=lambda group: group.used / group.total if group.total else 0.0, default=None)
    return {
        "id": node.id,
        "role": node.role,
        "model": node.hello.model.name,
        "url": node.url,
        "state": state,
        "reason": reason,
        "running": load.running,
        "waiting": load.waiting + load.pulling,
        "waiting_tokens": node.view().waiting_tokens,
        "leases": load.leases,
        "kv": None
        if fullest is None or not fullest.total
        else {"used": fullest.used, "cached": fullest.cached, "total": fullest.total},
    }


def _lanes(node: Node) -> list[dict[str, Any]]:
    """What a decode node has read over each of its lanes, and how fast, beside what the lane's self-tests reached."""
    counters = node.counters
    names = {name.removeprefix(head) for name in counters for head in (_PULLED, _TESTED) if name.startswith(head)}
    used = {name: counters.get(_PULLED + name, 0.0) for name in sorted(names)}
    pulled, seconds = counters.get("pull_bytes", 0.0), counters.get("pull_seconds", 0.0)
    found = []
    for name, size in used.items():
        tested, tested_s = counters.get(_TESTED + name, 0.0), counters.get(_TESTED_S + name, 0.0)
        if not size and not tested:
            continue
        found.append(
            {
                "decode": node.id,
                "lane": name,
                "sources": list(node.met),
                "chosen": counters.get(f"lane_chosen_{name}", 0.0),
                "bytes": size,
                # The time of pulls is counted over all lanes: it is a lane's own where there is no other.
                "bytes_per_s": pulled / seconds if seconds and size == pulled else None,
                "self_test_bytes_per_s": tested / tested_s if tested_s else None,
                "slow_pulls": counters.get("slow_pulls", 0.0),
            }
        )
    return found
