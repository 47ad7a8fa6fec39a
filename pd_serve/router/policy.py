"""Which nodes serve a sequence: pure functions of plain data, so that a simulator can run the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import NamedTuple

_KV_HEADROOM_MIN = 0.02  # a full pool counts as fifty times its queue


class NodeView(NamedTuple):
    """What the router knows of a node now: its last status and what was sent to it since."""

    id: str
    layout: str  # only nodes of equal layout exchange KV
    sequences: int  # waiting, running and pulling; with those sent since the status
    waiting_tokens: int  # prompt tokens not computed; with those sent since the status
    kv_used: float  # 0 ... 1, of the fullest layer group
    draining: bool
    local_prefill_tokens: int  # decode: prompts up to this length are computed there


class Placement(NamedTuple):
    """At least one is set. Without a decode node the prefill node finishes the sequence; without a
    prefill node the decode node computes the prompt."""

    prefill: str | None
    decode: str | None


class Nowhere(Enum):
    NO_NODES = "no nodes"  # none that could ever take it: wait for one
    REFUSED = "refused"  # all that could take it have refused


def place(
    prefill: Sequence[NodeView],
    decode: Sequence[NodeView],
    *,
    prompt_tokens: int,
    last_token: bool = False,
    local: bool = False,
    avoid: Mapping[str, int] | None = None,
    refused: AbstractSet[str] = frozenset(),
    turn: int = 0,
) -> Placement | Nowhere:
    """The least loaded pair of equal layout.

    ``last_token``: one more token ends the sequence, so there is nothing to decode. ``local``: no transfer, please.
    ``avoid``: how often a node failed under this sequence; such nodes are taken only when there is no better one.
    ``turn`` rotates the choice among equally loaded nodes.
    """
    prefill = [node for node in prefill if not node.draining]
    decode = [node for node in decode if not node.draining]

    def ranked(nodes: Sequence[NodeView], load: Callable[[NodeView], float]) -> list[NodeView]:
        count = len(nodes)
        order = [nodes[(place + turn) % count] for place in range(count)]
        failures = avoid or {}
        return sorted(
            (node for node in order if node.id not in refused), key=lambda node: (failures.get(node.id, 0), load(node))
        )

    if last_token and prefill and not local:
        best = ranked(prefill, prefill_load)
        return Placement(best[0].id, None) if best else Nowhere.REFUSED
    if not decode:
        return Nowhere.NO_NODES
    for target in ranked(decode, decode_load):
        sources = [node for node in prefill if node.layout == target.layout]
        if local or not sources or prompt_tokens <= target.local_prefill_tokens:
            return Placement(None, target.id)
        best = ranked(sources, prefill_load)
        if best:
            return Placement(best[0].id, target.id)
    return Nowhere.REFUSED


def prefill_load(node: NodeView) -> float:
    """Tokens before ours, and a little for each sequence so that empty queues compare, too."""
    return node.waiting_tokens + node.sequences


def decode_load(node: NodeView) -> float:
    """Sequences per share of free KV memory: a batch that is about to be preempted is no place to go."""
    return (node.sequences + 1) / max(1.0 - node.kv_used, _KV_HEADROOM_MIN)
