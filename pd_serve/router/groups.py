"""Which nodes serve which model, who of them can work with whom, and who waits for one.

Links add and remove nodes here; streams look for nodes here and wait for one. Knows no network.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import msgspec

from pd_serve.api.text_model import TextModel
from pd_serve.router import field
from pd_serve.router.breaker import Breakers
from pd_serve.router.field import Field
from pd_serve.router.line import Line
from pd_serve.router.nodes import MAX_MET, Node
from pd_serve.router.policy import Pair, Placement, longest
from pd_serve.wire import link
from pd_serve.wire.chunks import unpack

log = logging.getLogger(__name__)

Troubles = dict[str, tuple[str, str]]  # by node id: "misfit" or "failing", and why

_SETTLE_S = 1.0  # nodes link one after the other: until then a misfit may only be early


class Group:
    """The nodes that serve one model (same name, same fingerprint): any of them may take over from any other.

    ``text`` and ``info`` are those of the linked nodes; without nodes they are the last one's, and nobody may use them.
    """

    def __init__(self, text: TextModel, now_s: Callable[[], float] = time.monotonic) -> None:
        self.text = text
        self.prefill: dict[str, Node] = {}
        self.decode: dict[str, Node] = {}
        self.sources = field.sources()  # the same nodes, as placement sees them
        self.targets = field.targets()
        self.waiting: dict[object, tuple[float, Callable[[], None]]] = {}  # (age, told of a node)
        self.line = Line()
        self.rival = ""  # fingerprint of another group of this name, which has decode nodes; "": there is none
        self.breakers = Breakers(now_s)
        self._now_s = now_s
        self._texts = {_text_key(text.info): text}  # by age: the newest is used
        self._by_text: Counter[tuple[object, ...]] = Counter()  # nodes by text
        self._turn = random.getrandbits(32)  # routers that share nodes do not begin with the same ones
        self._complaining: dict[str, Node] = {}  # decode nodes that name misfits
        self._blocked: frozenset[Pair] | None = None  # pairs that ``_found`` was made with; None: it is stale
        self._found: Troubles = {}  # misfits
        self._misfits: dict[str, tuple[float, str]] = {}  # since when, and why; warned of when that has lasted
        self._warned: dict[str, str] = {}

    @property
    def info(self) -> link.ModelInfo:
        """``max_model_len``: what some pair of nodes can hold."""
        return self.text.info

    def nodes(self) -> list[Node]:
        return list({**self.prefill, **self.decode}.values())

    @property
    def linked(self) -> bool:
        """It has nodes."""
        return bool(self.prefill or self.decode)

    def turn(self) -> int:
        self._turn += 1
        return self._turn

    def enter(self, node: Node) -> None:
        if node.prefills:
            self.prefill[node.id] = node
        if node.decodes:
            self.decode[node.id] = node
        self._by_text[_text_key(node.hello.model)] += 1
        node.changed = self._changed
        self._changed(node)
        self.learn(node)

    def leave(self, node: Node) -> None:
        """Does nothing where it is not here."""
        if node.id not in self.prefill and node.id not in self.decode:
            return
        for nodes, seen in ((self.prefill, self.sources), (self.decode, self.targets)):
            if nodes.pop(node.id, None) is not None:
                seen.drop(node.id)
        self._by_text -= Counter([_text_key(node.hello.model)])
        self._complaining.pop(node.id, None)
        self._blocked = None

    def _changed(self, node: Node) -> None:
        """What placement sees of it may be something else now."""
        view = node.view()
        if node.id in self.prefill:
            self.sources.put(view)
        if node.id in self.decode:
            self.targets.put(view)

    def computed(self, node: Node, names: Sequence[int], cached_tokens: int | None) -> None:
        """The node has a prompt of these ``names`` now; ``cached_tokens``, where it said so, it had before.

        Noted of nodes that do not tell of their caches themselves."""
        if node.prefix_frame is not None:
            return
        for nodes, seen in ((self.prefill, self.sources), (self.decode, self.targets)):
            if node.id in nodes:
                if cached_tokens is not None:
                    seen.prefixes.found(node.id, names, cached_tokens)
                seen.prefixes.stored(node.id, names)

    def ttft_s(self, placement: Placement, prompt_tokens: int) -> float:
        """When the first token is expected there, by the prompt tokens before it; 0 where no rate was seen lately: who
        refuses by it would never see that a node has become faster."""
        computes_here = placement.prefill is None
        id = placement.decode if computes_here else placement.prefill
        node = (self.decode if computes_here else self.prefill).get(id or "")
        if node is None or not node.tokens_a_second or not node.rated_lately:
            return 0.0
        return (node.view().waiting_tokens + prompt_tokens - placement.cached) / node.tokens_a_second

    def cached(self, node: Node, frame: link.Prefixes) -> None:
        """What the node says of its cache. Raises ValueError where that makes no sense."""
        stored, evicted = unpack(frame.stored), unpack(frame.evicted)
        put_by, dropped = unpack(frame.host_stored), unpack(frame.host_evicted)
        if not frame.whole:
            if node.prefix_frame is None or frame.number <= node.prefix_frame:
                return  # the whole is still to come, or had this
            if frame.number > node.prefix_frame + 1:
                node.prefix_frame = None
                node.tell(link.GetPrefixes())
                return
        node.prefix_frame = frame.number
        for nodes, seen in ((self.prefill, self.sources), (self.decode, self.targets)):
            if node.id in nodes:
                if frame.whole:
                    seen.prefixes.forget(node.id)
                if put_by:  # before what left the device: that is still to be had
                    seen.prefixes.put_by(node.id, put_by)
                seen.prefixes.evicted(node.id, evicted)
                seen.prefixes.stored(node.id, stored)
                if dropped:
                    seen.prefixes.dropped(node.id, dropped)

    def known_prefixes(self, node: Node) -> int:
        """How many of its cached prefixes are known, by their names."""
        return max(self.sources.prefixes.count(node.id), self.targets.prefixes.count(node.id))

    def learn(self, node: Node) -> None:
        """Who it cannot read from, or whether it drains, may be something else now."""
        self._blocked = None
        if node.misfits and node.id in self.decode:
            self._complaining[node.id] = node
        else:
            self._complaining.pop(node.id, None)

    # --- what it serves -------------------------------------------------------------------------------

    def knows(self, info: link.ModelInfo) -> bool:
        return _text_key(info) in self._texts

    def add_text(self, text: TextModel) -> None:
        self._texts.setdefault(_text_key(text.info), text)

    def refresh(self) -> None:
        """After nodes came, left or began to drain: text and limit are those of the nodes that are there."""
        if not self.linked:
            return
        if any(key not in self._by_text for key in self._texts):
            self._texts = {key: text for key, text in self._texts.items() if key in self._by_text} or self._texts
        *_, text = self._texts.values()
        limit = longest(self.sources.lengths(), self.targets.lengths())
        if text.info.max_model_len != limit:
            text.info = msgspec.structs.replace(text.info, max_model_len=limit)
        self.text = text

    # --- who can work with whom -----------------------------------------------------------------------

    def unfit(self, *, due: bool = False) -> dict[Pair, str]:
        """Pairs that cannot exchange KV now, and why: what decode nodes say, and pairs that only fail.

        ``due``: also pairs whose next request is a trial.
        """
        if not self._complaining and not self.breakers:
            return {}
        found = {
            (source, node.id): reason
            for node in self._complaining.values()
            for source, reason in node.misfits.items()
            if source in self.prefill
        }
        if self.breakers:
            blocked = self.breakers.blocked(due=due)
            found |= {key: why for key, why in blocked.items() if isinstance(key, tuple)}
        return found

    def troubles(self, *, due: bool = True) -> Troubles:
        """State ("misfit" or "failing") and reason of every node that is not well, until it has done well again.

        Without ``due``: of those that get no requests now, not even a trial.
        """
        if not self.breakers and self._blocked == frozenset():
            return self._found
        blocked = self.breakers.blocked(due=due) if self.breakers else {}
        pairs = frozenset(key for key in blocked if isinstance(key, tuple))
        if self._blocked is None or self._blocked != pairs:
            self._found = self._find_misfits(self.unfit(due=due))
            self._blocked = pairs
        if not blocked:
            return self._found
        failing = {
            key: ("failing", why)
            for key, why in blocked.items()
            if isinstance(key, str) and (key in self.prefill or key in self.decode)
        }
        return failing | self._found

    def _find_misfits(self, unfit: dict[Pair, str]) -> Troubles:
        """Nodes that no node can work with, and why. Nodes that drain are nobody's partners."""
        found: dict[str, str] = {}
        if self.rival and not self.decode:
            why = (
                f"decode nodes serve {self.info.name!r} from other files or in another dtype (fingerprint "
                f"{self.rival}, here {self.info.fingerprint}): start all nodes alike, or name one model otherwise "
                "(--served-model-name)"
            )
            return {id: ("misfit", why) for id, node in self.prefill.items() if not node.decodes}
        readers, sources = _layouts(self.targets), _layouts(self.sources)
        if readers and any(layout not in readers for layout, _, _ in self.sources.kinds):
            others = [other for other in self.decode.values() if not other.load.draining]
            theirs = " and ".join(dict.fromkeys(_layout(other) for other in others))
            for node in self.prefill.values():
                if node.hello.layout not in readers and not node.decodes:  # a decode node serves alone
                    found[node.id] = (
                        f"no decode node has its KV layout, {_layout(node)}, but {theirs}: start all nodes with the "
                        "same --dtype and --kv-cache-dtype"
                    )
        of_sources, of_readers = Counter[str](), Counter[str]()
        for (source_id, reader_id), why in unfit.items():
            source, reader = self.prefill.get(source_id), self.decode.get(reader_id)
            if source is None or reader is None or source.hello.layout != reader.hello.layout:
                continue
            layout = source.hello.layout
            of_sources[source_id] += not reader.load.draining
            of_readers[reader_id] += not source.load.draining
            if not source.decodes and 0 < readers[layout] == of_sources[source_id]:
                found.setdefault(source_id, why)
            if 0 < sources[layout] == of_readers[reader_id]:
                found.setdefault(reader_id, why)
        return {id: ("misfit", why) for id, why in found.items()}

    def judge(self) -> None:
        """One warning for a node that has become a misfit, one word when it no longer is."""
        troubles = self.troubles()
        if not troubles and not self._misfits and not self._warned:
            return
        now_s = self._now_s()
        found = {id: reason for id, (state, reason) in troubles.items() if state == "misfit"}
        self._misfits = {id: (self._misfits.get(id, (now_s, ""))[0], reason) for id, reason in found.items()}
        for id, (since_s, reason) in self._misfits.items():
            if id not in self._warned and now_s - since_s >= _SETTLE_S:
                self._warned[id] = reason
                log.warning("node %s gets no requests, no other node can work with it: %s", id, reason)
        for id in [id for id in self._warned if id not in found]:
            del self._warned[id]
            log.info("node %s is no misfit any more, or has left", id)

    def serving(self) -> tuple[int, int]:
        """How many prefill and decode nodes take requests."""
        troubles = self.troubles()

        def count(nodes: dict[str, Node], seen: Field) -> int:
            ill = sum(id in nodes and not nodes[id].load.draining for id in troubles)
            return seen.staying() - ill

        return count(self.prefill, self.sources), count(self.decode, self.targets)

    def forget_misfits(self) -> None:
        """They are to be found again."""
        self._blocked = None

    def wake(self) -> None:
        """There is a node for those that wait: the oldest first."""
        for _, callback in sorted(self.waiting.values(), key=lambda entry: entry[0]):
            callback()
        self.line.advance()

    def introduce(self, node: Node) -> None:
        """Decode nodes hear of a bounded number of prefill nodes before they need them, those of their own host first,
        so that nothing has to be connected for a request; of others when one comes."""
        if node.decodes:
            sources = _acquaintances(node, self.prefill)
            for source in sources:
                node.meet(source.id)
            if sources:
                node.tell(link.Peers([source.source for source in sources]))
        if node.prefills:
            for reader in _acquaintances(node, self.decode):
                reader.meet(node.id)
                reader.tell(link.Peers([node.source]))
                self._changed(reader)
        self._changed(node)


def _acquaintances(node: Node, others: dict[str, Node]) -> list[Node]:
    """Some of ``others``, of equal layout: those on its host first."""
    near: list[Node] = []
    far: list[Node] = []
    if len(others) <= MAX_MET:
        seen: Iterable[Node] = others.values()
    else:  # whoever came beside it is likely to be on its host; and any
        seen = chain(islice(reversed(others.values()), MAX_MET), random.sample(list(others.values()), MAX_MET))
    for other in {id(o): o for o in seen}.values():
        if other is not node and other.hello.layout == node.hello.layout:
            (near if other.host == node.host else far).append(other)
    return [*near, *random.sample(far, len(far))][:MAX_MET]


def _layout(node: Node) -> str:
    return node.hello.layout_text or node.hello.layout


def _text_key(info: link.ModelInfo) -> tuple[object, ...]:
    """What a text side is the same by."""
    return info.text, info.vocab_size, tuple(info.eos_token_ids)


def _layouts(seen: Field) -> Counter[str]:
    """How many nodes of each layout do not drain."""
    found = Counter[str]()
    for (layout, _, draining), count in seen.kinds.items():
        if not draining:
            found[layout] += count
    return found


class Registry:
    """All groups. The newest group of a name that has nodes is the one that new requests go to."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.groups: dict[tuple[str, str], Group] = {}
        self.watchers: set[Callable[[], None]] = set()  # called when a node was added; must not raise
        self.seen = False  # a node was linked at some time
        self._now_s = now_s
        self._by_id: dict[str, Node] = {}

    def nodes(self) -> list[Node]:
        return list(self._by_id.values())

    def get(self, node_id: str) -> Node | None:
        return self._by_id.get(node_id)

    def group(self, info: link.ModelInfo) -> Group | None:
        return self.groups.get((info.name, info.fingerprint))

    def knows(self, info: link.ModelInfo) -> bool:
        """The text side of such a node is here."""
        group = self.group(info)
        return group is not None and group.knows(info)

    def add_group(self, text: TextModel) -> Group:
        """A model's text side; groups of the same name that have no nodes left give way."""
        key = (text.info.name, text.info.fingerprint)
        for other in [k for k, g in self.groups.items() if k[0] == key[0] and k != key and not g.linked]:
            del self.groups[other]
        group = self.groups.setdefault(key, Group(text, self._now_s))
        group.add_text(text)
        return group

    def add(self, node: Node) -> None:
        """Its group and text must be there. The caller has removed an older node of the same id."""
        group = self.groups[(node.hello.model.name, node.hello.model.fingerprint)]
        self._by_id[node.id] = node
        self.seen = True
        self._take_up(group, node)

    def role(self, node: Node, role: link.Role) -> None:
        """The node does something else from now on; what it works on stays where it is."""
        group = self.group(node.hello.model)
        if group is None or self._by_id.get(node.id) is not node:
            return
        log.info("%s is %s from now on", node.title, role.role)
        group.leave(node)
        node.hello = msgspec.structs.replace(node.hello, role=role.role, peer_addresses=role.peer_addresses)
        self._take_up(group, node)

    def _take_up(self, group: Group, node: Node) -> None:
        group.enter(node)
        node.prefix_frame = None  # what was known of it in another role is gone
        node.tell(link.GetPrefixes())
        self._compare(node.hello.model.name)
        group.refresh()
        group.introduce(node)
        group.judge()
        for watcher in tuple(self.watchers):
            watcher()
        group.wake()

    def cached(self, node: Node, frame: link.Prefixes) -> None:
        """What a node says of its cache. Raises ValueError where that makes no sense."""
        group = self.group(node.hello.model)
        if group is not None and self._by_id.get(node.id) is node:
            group.cached(node, frame)

    def remove(self, node: Node, why: str) -> None:
        """The node is gone: its attempts are told. Does nothing when it was removed before."""
        if self._by_id.get(node.id) is not node:
            return
        node.alive = False
        del self._by_id[node.id]
        attempts, node.attempts = node.attempts, {}
        group = self.groups.get((node.hello.model.name, node.hello.model.fingerprint))
        if group is not None:
            group.leave(node)
            self._compare(node.hello.model.name)
            if attempts and not node.load.draining:
                group.breakers.failed(node.id, why)
            group.refresh()
            group.judge()
        for attempt in attempts.values():
            attempt.lost(node, why)

    def _compare(self, name: str) -> None:
        """Tells groups of one name of each other: prefill nodes that all decode nodes differ from are misfits."""
        groups = [group for (other, _), group in self.groups.items() if other == name]
        for group in groups:
            rivals = [other.info.fingerprint for other in groups if other is not group and other.decode]
            rival = rivals[-1] if rivals else ""
            if rival != group.rival:
                group.rival = rival
                group.forget_misfits()

    def status(self, node: Node, status: link.Status) -> None:
        before = node.load.draining, node.misfits
        node.status(status)
        group = self.group(node.hello.model)
        if group is None:
            return
        if before != (status.load.draining, status.misfits):
            group.learn(node)
            group.refresh()
        group.judge()
        if before != (status.load.draining, status.misfits) and not status.load.draining:
            group.wake()

    def leaving(self, node: Node, leaving: bool) -> None:
        """Whoever lists it says that the node is about to leave, before it does so itself."""
        if node.leaving == leaving:
            return
        node.leaving = leaving
        self.status(node, link.Status(node.load, misfits=node.misfits, lanes=node.lanes))

    def names(self) -> list[str]:
        """Served names, those whose nodes have all left included: they may come back."""
        return list(dict.fromkeys(name for name, _ in self.groups))

    def find(self, name: str) -> Group | None:
        """The group to serve ``name`` now: the one with most complete sets of nodes, the newest of equals.

        None while it has no node: there is nothing that a request could be read by.
        """
        groups = [group for (other, _), group in self.groups.items() if other == name and group.linked]
        if len(groups) == 1:
            return groups[0]
        return max(reversed(groups), key=_usefulness, default=None)


def _usefulness(group: Group) -> tuple[bool, int, int]:
    prefill, decode = group.serving()
    return decode > 0, min(prefill, decode), decode
