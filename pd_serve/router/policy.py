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
from enum import Enum
from typing import NamedTuple

import msgspec

from pd_serve.router.field import FULL, Entry, Field, NodeView
from pd_serve.router.prefixes import Prefixes

_STAY = 0.1  # of the prompt: so much more than the best may the node cost that has most of it cached
_NOTHING = float("inf")
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


class Terms(msgspec.Struct, gc=False):
    """What one stream asks of its nodes, and what it has met with.

    ``total_tokens``: prompt and all output. ``avoid``: how often a node failed under this stream; such nodes are
    taken only when there is no better one. ``unfit``: pairs that cannot exchange KV now. ``unwell``: nodes that only
    fail, or that no other can work with. ``begun``: its client has tokens, so that nodes take it beyond their bound.
    ``turn`` chooses among equally loaded nodes. ``chain``: the names of the prompt's prefixes.
    """

    prompt_tokens: int = 0  # to be computed, output of earlier attempts included
    total_tokens: int = 0
    avoid: Mapping[str, int] = {}
    refused: AbstractSet[str] = frozenset()
    unfit: AbstractSet[Pair] = frozenset()
    unwell: Collection[str] = ()
    begun: bool = False
    turn: int = 0
    chain: Sequence[int] = ()

    def some(self, nodes: Field, layout: str | None = None, met: Collection[str] = ()) -> list[Entry]:
        """Usable ones. ``met``: those to choose some of besides."""
        named = nodes.prefixes.owners(self.chain) if self.chain else ()
        if self.refused or self.avoid or self.unwell:
            # Those that have refused are among them, as a sign that full ones would, too.
            without = {*self.refused, *self.avoid, *self.unwell}
            found = nodes.some(self.turn, layout, without=without, named=(*named, *self.refused), met=met)
        else:
            found = nodes.some(self.turn, layout, named=named, met=met)
            if nodes.takes(self.total_tokens):
                return found
        return self.usable(found)

    def usable(self, nodes: list[Entry]) -> list[Entry]:
        """Those that it fits; the unwell ones only when there are no others."""
        total = self.total_tokens
        fitting = [entry for entry in nodes if not (node := entry[1]).draining and node.max_model_len >= total]
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

    def targets(self, nodes: list[Entry], known: Prefixes) -> list[tuple[float, int, int, NodeView]]:
        """Decode nodes, best first: cost, place, the tokens of the prompt that it has, and the node. To have the prompt
        counts as much as a sequence less."""
        chain, held = self.chain, known.held
        head = chain[0] if chain else None
        found = []
        for place, (cost, node) in enumerate(self.willing(nodes)):
            own = 0
            if (names := held.get(node.id)) and head in names:  # looked at here: most have nothing of it
                own = known.tokens(node.id, chain)
                cost -= own / self.prompt_tokens
            if node.full or self.avoid:
                cost += self.penalty(node)
            found.append((cost, place, own, node))
        found.sort()
        return found

    def source(
        self, nodes: list[Entry], target: NodeView | None, known: Prefixes, moved: int = 0
    ) -> tuple[NodeView, int] | None:
        """The best to compute the prompt, or the one that has most of it already unless that costs clearly more; and
        the tokens that it has. Of equals, the one that decodes as well. ``moved``: tokens that the target lacks."""
        met, own, lanes = (target.met, target.id, target.lanes) if target is not None else ((), "", {})
        chain, held, avoided = self.chain, known.held, bool(self.avoid)
        head = chain[0] if chain else None
        best, least, most = None, _NOTHING, 0
        having = []  # those that have some of the prompt
        for cost, node in self.willing(nodes):
            id, cached = node.id, 0
            if (names := held.get(id)) and head in names:
                cached = known.tokens(id, chain)
                cost -= cached
            if id == own:
                cost -= 0.5
            elif lanes and (rate := lanes.get(id, 0.0)) > 0:
                cost += moved * node.tokens_a_second / rate
            elif id not in met:
                cost += _MEET_TOKENS
            if avoided or node.full:
                cost += self.penalty(node)
            if cached:
                having.append((cost, cached, node))
            if cost < least:
                best, least, most = node, cost, cached
        if best is None:
            return None
        within = least + _STAY * self.prompt_tokens
        for cost, cached, node in having:
            if cached > most and cost <= within:
                best, most = node, cached
        return best, min(most, self.prompt_tokens - 1)


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
        sources = terms.usable(prefill.all()) if whole else terms.some(prefill)
        if sources:
            best = terms.source(sources, None, prefill.prefixes)
            return Placement(best[0].id, None, cached=best[1]) if best is not None else Nowhere.REFUSED
    targets = terms.usable(decode.all()) if whole else terms.some(decode)
    if not targets:
        return Nowhere.NO_NODES
    for _, _, own, target in terms.targets(targets, decode.prefixes):
        if local or terms.prompt_tokens <= target.local_prefill_tokens:
            return Placement(None, target.id)
        sources = _sources(prefill, target, terms, whole=whole)
        if not sources:
            return Placement(None, target.id)
        lacks = terms.prompt_tokens - own
        best = terms.source(sources, target, prefill.prefixes, lacks)
        if best is None:
            continue
        node, cached = best
        if node.id == target.id:
            return Placement(None, target.id)  # of both roles, and no other is cheaper: nothing has to be moved
        # One that has nearly all of the prompt may compute the rest itself.
        ask = target.queueing or target.full or lacks <= target.local_prefill_tokens
        return Placement(node.id, target.id, ask, cached)
    return Nowhere.REFUSED


def _sources(prefill: Field, target: NodeView, terms: Terms, *, whole: bool) -> list[Entry]:
    """Prefill nodes that the target can read from: some of them, all where those do not fit."""
    unfit = terms.unfit
    if not whole:
        found = terms.some(prefill, target.layout, target.met)
        if unfit:
            found = [entry for entry in found if (entry[1].id, target.id) not in unfit]
        if found:
            return found
    nodes = terms.usable(prefill.all(target.layout))
    return [entry for entry in nodes if (entry[1].id, target.id) not in unfit]


def reader(source: NodeView, decode: Field, terms: Terms) -> str | None:
    """Another decode node for what the prefill node ``source`` computes already; None where there is none."""
    for nodes in (terms.some(decode, source.layout), terms.usable(decode.all(source.layout))):
        fitting = [(load, d) for load, d in nodes if d.id != source.id and (source.id, d.id) not in terms.unfit]
        best = terms.targets(fitting, decode.prefixes)
        if best:
            return best[0][3].id
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
