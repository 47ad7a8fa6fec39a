"""Which nodes serve a stream: pure functions of plain data, so that a simulator can run the same code.

A prefill node costs the tokens that are to be computed before ours and of ours: its queue, what of the prompt its
cache lacks, and as many as it could compute while the KV moves over the pair's lane. So a prefix draws requests to
whoever has it until that node's queue is longer than computing it again, and then it is soon at another node as well.
A decode node costs its sequences per share of free memory. Of many nodes a dozen are compared
(see :mod:`pd_serve.router.field`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from pd_serve.router.field import FULL, Entry, Field, NodeView
from pd_serve.router.prefixes import Prefixes

_STAY = 0.1  # of the prompt: so much more than the best may the node cost that has most of it cached
_AVOIDED = 1e18  # a node that failed comes after all that did not, full ones too
_MEET_TOKENS = 256  # of a source that the decode node is not connected to yet: a handshake and a self-test

Pair = tuple[str, str]  # ids of a prefill and a decode node


class Placement(NamedTuple):
    """At least one is set. Without a decode node the prefill node finishes the stream; without a
    prefill node the decode node computes the prompt. ``ask``: the decode node is likely to refuse, or to compute the
    prompt itself, so its answer comes before the prompt is computed. ``cached``: tokens that the prefill node is
    thought to have."""

    prefill: str | None
    decode: str | None
    ask: bool = False
    cached: int = 0


class Nowhere(Enum):
    NO_NODES = "no nodes"  # none that could ever take it: wait for one
    REFUSED = "refused"  # all that could take it have refused


@dataclass(slots=True)
class Terms:
    """What one stream asks of its nodes, and what it has met with.

    ``total_tokens``: prompt and all output. ``avoid``: how often a node failed under this stream; such nodes are
    taken only when there is no better one. ``unfit``: pairs that cannot exchange KV now. ``unwell``: nodes that only
    fail, or that no other can work with. ``begun``: its client has tokens, so that nodes take it beyond their bound.
    ``turn`` chooses among equally loaded nodes. ``chain``: the names of the prompt's prefixes.
    """

    prompt_tokens: int = 0  # to be computed, output of earlier attempts included
    total_tokens: int = 0
    avoid: Mapping[str, int] = field(default_factory=dict)
    refused: AbstractSet[str] = frozenset()
    unfit: AbstractSet[Pair] = frozenset()
    unwell: Collection[str] = ()
    begun: bool = False
    turn: int = 0
    chain: Sequence[int] = ()

    def some(self, nodes: Field, layout: str | None = None, met: tuple[str, ...] = ()) -> list[Entry]:
        """``met``: those to choose some of besides."""
        named = nodes.prefixes.owners(self.chain) if self.chain else ()
        if not (self.refused or self.avoid or self.unwell):
            return nodes.some(self.turn, layout, named=named, met=met)
        # Those that have refused are among them, as a sign that full ones would, too.
        without = {*self.refused, *self.avoid, *self.unwell}
        return nodes.some(self.turn, layout, without=without, named=(*named, *self.refused), met=met)

    def usable(self, nodes: list[Entry]) -> list[Entry]:
        """Those that it fits; the unwell ones only when there are no others."""
        total = self.total_tokens
        fitting = [entry for entry in nodes if not entry[1].draining and entry[1].max_model_len >= total]
        if not self.unwell:
            return fitting
        return [entry for entry in fitting if entry[1].id not in self.unwell] or fitting

    def willing(self, nodes: list[Entry]) -> list[Entry]:
        """Those that have not refused."""
        if not self.refused:
            return nodes
        left = [entry for entry in nodes if entry[1].id not in self.refused]
        if len(left) < len(nodes) and not self.begun:
            left = [entry for entry in left if not entry[1].full]  # one has said so: the others would say the same
        return left

    def penalty(self, node: NodeView) -> float:
        """What keeps it behind all others that are without."""
        return self.avoid.get(node.id, 0) * _AVOIDED + (FULL if node.full and not self.begun else 0.0)

    def alone(self, node: NodeView, known: Prefixes) -> bool:
        """The decode node may have so much of the prompt that it computes the rest itself."""
        if not self.chain or not node.local_prefill_tokens:
            return False
        return self.prompt_tokens - known.tokens(node.id, self.chain) <= node.local_prefill_tokens

    def targets(self, nodes: list[Entry], known: Prefixes) -> list[NodeView]:
        """Decode nodes, best first. To have the prompt counts as much as a sequence less."""
        left = self.willing(nodes)
        if len(left) <= 1:
            return [node for _, node in left]
        chain, tokens, total = self.chain, known.tokens, self.prompt_tokens
        found = []
        for place, (load, node) in enumerate(left):
            own = tokens(node.id, chain) / total if chain else 0.0
            if node.full or self.avoid:
                load += self.penalty(node)
            found.append((load - own, place, node))
        found.sort()
        return [node for _, _, node in found]

    def source(
        self, nodes: list[Entry], target: NodeView | None, known: Prefixes, moved: int = 0
    ) -> tuple[NodeView, int] | None:
        """The best to compute the prompt, or the one that has most of it already unless that costs clearly more; and
        the tokens that it has. Of equals, the one that decodes as well. ``moved``: tokens that the target lacks."""
        left = self.willing(nodes)
        if not left:
            return None
        met, own, lanes = (target.met, target.id, target.lanes) if target is not None else ((), "", {})
        chain, tokens = self.chain, known.tokens
        found = []
        for place, (load, node) in enumerate(left):
            cached = tokens(node.id, chain) if chain else 0
            cost = load - cached
            if node.id == own:
                cost -= 0.5
            elif (rate := lanes.get(node.id, 0.0)) > 0:
                cost += moved * node.tokens_a_second / rate
            elif node.id not in met:
                cost += _MEET_TOKENS
            if node.full or self.avoid:
                cost += self.penalty(node)
            found.append((cost, place, cached, node))
        best = min(found)
        if chain:
            within = best[0] + _STAY * self.prompt_tokens
            for other in found:
                if other[2] > best[2] and other[0] <= within:
                    best = other
        return best[3], min(best[2], self.prompt_tokens - 1)


def place(
    prefill: Field, decode: Field, terms: Terms, *, last_token: bool = False, local: bool = False
) -> Placement | Nowhere:
    """The cheapest pair of equal layout. A node of both roles is in both fields, and may be both of a pair.

    ``last_token``: one more token ends the stream, so there is nothing to decode. ``local``: no transfer, please.
    """
    found = _place(prefill, decode, terms, last_token, local, whole=False)
    if isinstance(found, Placement):
        return found
    needed = [prefill] if last_token and not local else [decode] if local else [prefill, decode]
    if found is Nowhere.NO_NODES or terms.begun or all(nodes.open(terms.refused) for nodes in needed):
        return _place(prefill, decode, terms, last_token, local, whole=True)
    return found


def _place(
    prefill: Field, decode: Field, terms: Terms, last_token: bool, local: bool, *, whole: bool
) -> Placement | Nowhere:
    """``whole``: of all nodes, instead of some."""
    if last_token and not local:
        sources = terms.usable(prefill.all() if whole else terms.some(prefill))
        if sources:
            best = terms.source(sources, None, prefill.prefixes)
            return Placement(best[0].id, None, cached=best[1]) if best is not None else Nowhere.REFUSED
    targets = terms.usable(decode.all() if whole else terms.some(decode))
    if not targets:
        return Nowhere.NO_NODES
    for target in terms.targets(targets, decode.prefixes):
        if local or terms.prompt_tokens <= target.local_prefill_tokens:
            return Placement(None, target.id)
        sources = _sources(prefill, target, terms, whole=whole)
        if not sources:
            return Placement(None, target.id)
        moved = terms.prompt_tokens - (decode.prefixes.tokens(target.id, terms.chain) if terms.chain else 0)
        best = terms.source(sources, target, prefill.prefixes, moved)
        if best is None:
            continue
        node, cached = best
        if node.id == target.id:
            return Placement(None, target.id)  # of both roles, and no other is cheaper: nothing has to be moved
        ask = target.queueing or target.full or terms.alone(target, decode.prefixes)
        return Placement(node.id, target.id, ask, cached)
    return Nowhere.REFUSED


def _sources(prefill: Field, target: NodeView, terms: Terms, *, whole: bool) -> list[Entry]:
    """Prefill nodes that the target can read from: some of them, all where those do not fit."""
    unfit = terms.unfit
    if not whole:
        found = terms.usable(terms.some(prefill, target.layout, target.met))
        if unfit:
            found = [entry for entry in found if (entry[1].id, target.id) not in unfit]
        if found:
            return found
    nodes = terms.usable(prefill.all(target.layout))
    return [entry for entry in nodes if (entry[1].id, target.id) not in unfit]


def reader(source: NodeView, decode: Field, terms: Terms) -> str | None:
    """Another decode node for what the prefill node ``source`` computes already; None where there is none."""
    for nodes in (terms.some(decode, source.layout), decode.all(source.layout)):
        fitting = [
            (load, d) for load, d in terms.usable(nodes) if d.id != source.id and (source.id, d.id) not in terms.unfit
        ]
        best = terms.targets(fitting, decode.prefixes)
        if best:
            return best[0].id
        if not (terms.begun or decode.open(terms.refused)):
            break
    return None


def longest(prefill: Sequence[tuple[str, int]], decode: Sequence[tuple[str, int]]) -> int:
    """The longest sequence that some pair can hold, of (layout, max_model_len) of each node; 0 without nodes.

    Where nodes of one kind only are there: the longest that one of them can hold.
    """
    pairs = [min(p, d) for layout, d in decode for other, p in prefill if other == layout]
    alone = [length for _, length in (decode or prefill)]
    return max(pairs or alone, default=0)
