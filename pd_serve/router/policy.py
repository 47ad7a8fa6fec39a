"""Which nodes serve a stream: pure functions of plain data, so that a simulator can run the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

_KV_HEADROOM_MIN = 0.02  # a full pool counts as fifty times its queue
_ANY_LENGTH = 1 << 62

Pair = tuple[str, str]  # ids of a prefill and a decode node


class NodeView(NamedTuple):
    """What the router knows of a node now: its last status and what was sent to it since."""

    id: str
    layout: str  # only nodes of equal layout exchange KV
    sequences: int  # waiting, running and pulling; with those sent since the status
    waiting_tokens: int  # prompt tokens not computed; with those sent since the status
    kv_used: float  # 0 ... 1, of the fullest layer group
    draining: bool
    local_prefill_tokens: int  # decode: prompts up to this length are computed there
    max_model_len: int = _ANY_LENGTH  # prompt and output tokens of one sequence
    full: bool = False  # its queue was full when it last spoke
    queueing: bool = False  # what comes now waits for memory there
    unwell: bool = False  # it only fails, or no other node can work with it


class Placement(NamedTuple):
    """At least one is set. Without a decode node the prefill node finishes the stream; without a
    prefill node the decode node computes the prompt. ``ask``: the decode node is likely to refuse, so its
    answer comes before the prompt is computed."""

    prefill: str | None
    decode: str | None
    ask: bool = False


class Nowhere(Enum):
    NO_NODES = "no nodes"  # none that could ever take it: wait for one
    REFUSED = "refused"  # all that could take it have refused


@dataclass(frozen=True)
class Terms:
    """What one stream asks of its nodes, and what it has met with.

    ``total_tokens``: prompt and all output. ``avoid``: how often a node failed under this stream; such nodes are
    taken only when there is no better one. ``unfit``: pairs that cannot exchange KV now. ``begun``: its client has
    tokens, so that nodes take it beyond their bound. ``turn`` rotates the choice among equally loaded nodes.
    """

    total_tokens: int = 0
    avoid: Mapping[str, int] | None = None
    refused: AbstractSet[str] = frozenset()
    unfit: AbstractSet[Pair] = frozenset()
    begun: bool = False
    turn: int = 0

    def usable(self, nodes: Sequence[NodeView]) -> list[NodeView]:
        """Those that it fits; the unwell ones only when there are no others."""
        fitting = [node for node in nodes if not node.draining and node.max_model_len >= self.total_tokens]
        return [node for node in fitting if not node.unwell] or fitting

    def ranked(self, nodes: Sequence[NodeView], load: Callable[[NodeView], Any]) -> list[NodeView]:
        """Those that have not refused, best first."""
        count, avoid = len(nodes), self.avoid or {}
        order = [nodes[(place + self.turn) % count] for place in range(count)]
        left = [node for node in order if node.id not in self.refused]
        if len(left) < count and not self.begun:
            left = [node for node in left if not node.full]  # one has said so: the others would say the same
        return sorted(left, key=lambda node: (avoid.get(node.id, 0), node.full and not self.begun, load(node)))


def place(
    prefill: Sequence[NodeView],
    decode: Sequence[NodeView],
    terms: Terms,
    *,
    prompt_tokens: int,
    last_token: bool = False,
    local: bool = False,
) -> Placement | Nowhere:
    """The least loaded pair of equal layout. A node of both roles is in both lists, and may be both of a pair.

    ``prompt_tokens``: to be computed, output of earlier attempts included. ``last_token``: one more token ends the
    stream, so there is nothing to decode. ``local``: no transfer, please.
    """
    prefill, decode = terms.usable(prefill), terms.usable(decode)
    if last_token and prefill and not local:
        best = terms.ranked(prefill, prefill_load)
        return Placement(best[0].id, None) if best else Nowhere.REFUSED
    if not decode:
        return Nowhere.NO_NODES
    for target in terms.ranked(decode, decode_load):
        sources = [p for p in prefill if p.layout == target.layout and (p.id, target.id) not in terms.unfit]
        if local or not sources or prompt_tokens <= target.local_prefill_tokens:
            return Placement(None, target.id)
        best = terms.ranked(sources, _freest_or(target.id))
        if best and best[0].id == target.id:
            return Placement(None, target.id)  # of both roles, and no other is freer: nothing has to be moved
        if best:
            return Placement(best[0].id, target.id, target.queueing or target.full)
    return Nowhere.REFUSED


def reader(source: NodeView, decode: Sequence[NodeView], terms: Terms) -> str | None:
    """Another decode node for what the prefill node ``source`` computes already; None where there is none."""
    targets = [
        d
        for d in terms.usable(decode)
        if d.layout == source.layout and d.id != source.id and (source.id, d.id) not in terms.unfit
    ]
    best = terms.ranked(targets, decode_load)
    return best[0].id if best else None


def longest(prefill: Sequence[tuple[str, int]], decode: Sequence[tuple[str, int]]) -> int:
    """The longest sequence that some pair can hold, of (layout, max_model_len) of each node; 0 without nodes.

    Where nodes of one kind only are there: the longest that one of them can hold.
    """
    pairs = [min(p, d) for layout, d in decode for other, p in prefill if other == layout]
    alone = [length for _, length in (decode or prefill)]
    return max(pairs or alone, default=0)


def _freest_or(own: str) -> Callable[[NodeView], tuple[float, bool]]:
    """Prefill nodes by load; of equals, the one that decodes as well."""
    return lambda node: (prefill_load(node), node.id != own)


def prefill_load(node: NodeView) -> float:
    """Tokens before ours, and a little for each sequence so that empty queues compare, too."""
    return node.waiting_tokens + node.sequences


def decode_load(node: NodeView) -> float:
    """Sequences per share of free KV memory: a batch that is about to be preempted is no place to go."""
    return (node.sequences + 1) / max(1.0 - node.kv_used, _KV_HEADROOM_MIN)
