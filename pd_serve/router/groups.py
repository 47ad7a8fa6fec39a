"""Which nodes serve which model, who of them can work with whom, and who waits for one.

Links add and remove nodes here; streams look for nodes here and wait for one. Knows no network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from pd_serve.api.text_model import TextModel
from pd_serve.router.breaker import Breakers
from pd_serve.router.line import Line
from pd_serve.router.nodes import Node
from pd_serve.router.policy import NodeView, Pair, longest
from pd_serve.wire import link

log = logging.getLogger(__name__)

Views = tuple[list[NodeView], list[NodeView], frozenset[Pair]]  # prefill nodes, decode nodes, pairs that are unfit

_SETTLE_S = 1.0  # nodes link one after the other: until then a misfit may only be early


class Group:
    """The nodes that serve one model (same name, same fingerprint): any of them may take over from any other.

    ``text`` and ``info`` are those of the linked nodes; without nodes they are the last one's, and nobody may use them.
    """

    def __init__(self, text: TextModel, now_s: Callable[[], float] = time.monotonic) -> None:
        self.text = text
        self.prefill: dict[str, Node] = {}
        self.decode: dict[str, Node] = {}
        self.waiting: dict[object, tuple[float, Callable[[], None]]] = {}  # (age, told of a node)
        self.line = Line()
        self.rival = ""  # fingerprint of another group of this name, which has decode nodes; "": there is none
        self.breakers = Breakers(now_s)
        self._now_s = now_s
        self._texts = {_text_key(text.info): text}  # by age: the newest is used
        self._turn = 0
        self._misfits: dict[str, tuple[float, str]] = {}  # since when, and why; warned of when that has lasted
        self._warned: dict[str, str] = {}

    @property
    def info(self) -> link.ModelInfo:
        """``max_model_len``: what some pair of nodes can hold."""
        return self.text.info

    def nodes(self) -> list[Node]:
        return list({**self.prefill, **self.decode}.values())

    def turn(self) -> int:
        self._turn += 1
        return self._turn

    # --- what it serves -------------------------------------------------------------------------------

    def knows(self, info: link.ModelInfo) -> bool:
        return _text_key(info) in self._texts

    def add_text(self, text: TextModel) -> None:
        self._texts.setdefault(_text_key(text.info), text)

    def refresh(self) -> None:
        """After nodes came, left or began to drain: text and limit are those of the nodes that are there."""
        nodes = self.nodes()
        if not nodes:
            return
        linked = {_text_key(node.hello.model) for node in nodes}
        self._texts = {key: text for key, text in self._texts.items() if key in linked} or self._texts
        *_, text = self._texts.values()
        limit = longest(_lengths(self.prefill), _lengths(self.decode))
        if text.info.max_model_len != limit:
            text.info = msgspec.structs.replace(text.info, max_model_len=limit)
        self.text = text

    # --- who can work with whom -----------------------------------------------------------------------

    def unfit(self, *, due: bool = False) -> dict[Pair, str]:
        """Pairs that cannot exchange KV now, and why: what decode nodes say, and pairs that only fail.

        ``due``: also pairs whose next request is a trial.
        """
        found = {
            (source, node.id): reason
            for node in self.decode.values()
            for source, reason in node.misfits.items()
            if source in self.prefill
        }
        if self.breakers:
            blocked = self.breakers.blocked(due=due)
            found |= {key: why for key, why in blocked.items() if isinstance(key, tuple)}
        return found

    def views(self) -> Views:
        unfit = self.unfit()
        unwell = self.troubles(due=False)
        prefill = [node.view(unwell=id in unwell) for id, node in self.prefill.items()]
        decode = [node.view(unwell=id in unwell) for id, node in self.decode.items()]
        return prefill, decode, frozenset(unfit)

    def troubles(self, *, due: bool = True) -> dict[str, tuple[str, str]]:
        """State ("misfit" or "failing") and reason of every node that is not well, until it has done well again.

        Without ``due``: of those that get no requests now, not even a trial.
        """
        unfit = self.unfit(due=due)
        found: dict[str, tuple[str, str]] = {}
        if self.breakers:
            blocked = self.breakers.blocked(due=due)
            found = {id: ("failing", blocked[id]) for id in (*self.prefill, *self.decode) if id in blocked}
        alone = bool(self.rival) and not self.decode
        if unfit or alone or len({node.hello.layout for node in self.nodes()}) > 1:
            for node in self.nodes():
                reason = self._misfit(node, unfit)
                if reason is not None:
                    found[node.id] = "misfit", reason
        return found

    def _misfit(self, node: Node, unfit: dict[Pair, str]) -> str | None:
        """Why no node can work with ``node``."""
        source = not node.decodes
        if source and self.rival and not self.decode:
            return (
                f"decode nodes serve {self.info.name!r} from other files or in another dtype (fingerprint "
                f"{self.rival}, here {self.info.fingerprint}): start all nodes alike, or name one model otherwise "
                "(--served-model-name)"
            )
        others = [other for other in (self.decode if source else self.prefill).values() if not other.load.draining]
        partners = [other for other in others if other.hello.layout == node.hello.layout]
        if not partners:
            # a decode node serves alone
            return _no_partner(node, others) if others and source else None
        reasons = [unfit.get((node.id, p.id) if source else (p.id, node.id)) for p in partners]
        return reasons[0] if all(reasons) else None

    def judge(self) -> None:
        """One warning for a node that has become a misfit, one word when it no longer is."""
        now_s = self._now_s()
        found = {id: reason for id, (state, reason) in self.troubles().items() if state == "misfit"}
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

        def count(nodes: dict[str, Node]) -> int:
            return sum(not node.load.draining and id not in troubles for id, node in nodes.items())

        return count(self.prefill), count(self.decode)

    def wake(self) -> None:
        """There is a node for those that wait: the oldest first."""
        for _, callback in sorted(self.waiting.values(), key=lambda entry: entry[0]):
            callback()
        self.line.advance()

    def announce(self) -> None:
        """Tells decode nodes which prefill nodes may be named as a source, so that they connect ahead of use."""
        for node in list(self.decode.values()):
            sources = [p for p in self.prefill.values() if p is not node and p.hello.layout == node.hello.layout]
            node.tell(link.Peers([source.source for source in sources]))


def _no_partner(node: Node, others: list[Node]) -> str:
    theirs = " and ".join(dict.fromkeys(_layout(other) for other in others))
    return (
        f"no decode node has its KV layout, {_layout(node)}, but {theirs}: start all nodes with the same --dtype and "
        "--kv-cache-dtype"
    )


def _layout(node: Node) -> str:
    return node.hello.layout_text or node.hello.layout


def _text_key(info: link.ModelInfo) -> tuple[object, ...]:
    """What a text side is the same by."""
    return info.text, info.vocab_size, tuple(info.eos_token_ids)


def _lengths(nodes: dict[str, Node]) -> list[tuple[str, int]]:
    """Layout and limit of each; of those that drain only where there are no others."""
    staying = [node for node in nodes.values() if not node.load.draining] or nodes.values()
    return [(node.hello.layout, node.hello.model.max_model_len) for node in staying]


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
        for other in [k for k, g in self.groups.items() if k[0] == key[0] and k != key and not g.nodes()]:
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
        group.prefill.pop(node.id, None)
        group.decode.pop(node.id, None)
        node.hello = msgspec.structs.replace(node.hello, role=role.role, peer_addresses=role.peer_addresses)
        self._take_up(group, node)

    def _take_up(self, group: Group, node: Node) -> None:
        if node.prefills:
            group.prefill[node.id] = node
        if node.decodes:
            group.decode[node.id] = node
        self._compare(node.hello.model.name)
        group.refresh()
        group.announce()
        group.judge()
        for watcher in tuple(self.watchers):
            watcher()
        group.wake()

    def remove(self, node: Node, why: str) -> None:
        """The node is gone: its attempts are told. Does nothing when it was removed before."""
        if self._by_id.get(node.id) is not node:
            return
        node.alive = False
        del self._by_id[node.id]
        attempts, node.attempts = node.attempts, {}
        group = self.groups.get((node.hello.model.name, node.hello.model.fingerprint))
        if group is not None:
            group.prefill.pop(node.id, None)
            group.decode.pop(node.id, None)
            self._compare(node.hello.model.name)
            if attempts and not node.load.draining:
                group.breakers.failed(node.id, why)
            group.refresh()
            if node.prefills:
                group.announce()
            group.judge()
        for attempt in attempts.values():
            attempt.lost(node, why)

    def _compare(self, name: str) -> None:
        """Tells groups of one name of each other: prefill nodes that all decode nodes differ from are misfits."""
        groups = [group for (other, _), group in self.groups.items() if other == name]
        for group in groups:
            rivals = [other.info.fingerprint for other in groups if other is not group and other.decode]
            group.rival = rivals[-1] if rivals else ""

    def status(self, node: Node, status: link.Status) -> None:
        before = node.load.draining, node.misfits
        node.status(status)
        group = self.group(node.hello.model)
        if group is None:
            return
        group.judge()
        if before != (status.load.draining, status.misfits):
            group.refresh()
            if not status.load.draining:
                group.wake()

    def names(self) -> list[str]:
        """Served names, those whose nodes have all left included: they may come back."""
        return list(dict.fromkeys(name for name, _ in self.groups))

    def find(self, name: str) -> Group | None:
        """The group to serve ``name`` now: the one with most complete sets of nodes, the newest of equals.

        None while it has no node: there is nothing that a request could be read by.
        """
        groups = [group for (other, _), group in self.groups.items() if other == name and group.nodes()]
        return max(reversed(groups), key=_usefulness, default=None)


def _usefulness(group: Group) -> tuple[bool, int, int]:
    prefill, decode = group.serving()
    return decode > 0, min(prefill, decode), decode
