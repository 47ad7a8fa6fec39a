"""The nodes that the router is linked to, grouped by model, and what is in flight on each.

Links add and remove nodes here; sequences look for nodes here and wait for one. Knows no network: a node is
written to through the function that its link gave it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from pd_serve.api.text_model import TextModel
from pd_serve.router.policy import NodeView
from pd_serve.wire import link
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)


class Attempt(Protocol):
    """One attempt of a sequence, as its nodes' links see it."""

    id: str

    def output(self, node: Node, output: link.Output, now_s: float) -> None: ...

    def lost(self, node: Node, why: str) -> None: ...


class Node:
    """A linked node. ``attempts``: what it works on for this router; frames for other ids are late and ignored."""

    def __init__(self, hello: link.Hello, send: Callable[[link.ToNode], None]) -> None:
        self.hello = hello
        self.id = hello.node_id
        self.role = hello.role
        self.url = hello.url
        self.load = hello.load
        self.counters: dict[str, float] = {}
        self.memory: MemoryReport | None = None
        self.attempts: dict[str, Attempt] = {}
        self.alive = True
        self._send = send
        self._sent = 0  # attempts since the last status
        self._sent_tokens = 0

    @property
    def source(self) -> link.Source:
        return link.Source(self.id, self.hello.epoch, self.hello.peer_address)

    def submit(self, attempt: Attempt, submit: link.Submit) -> None:
        self.attempts[attempt.id] = attempt
        self._sent += 1
        self._sent_tokens += len(submit.tokens) // 4
        self._send(submit)

    def abort(self, id: str) -> None:
        if self.alive:
            self._send(link.Abort([id]))

    def tell(self, message: link.ToNode) -> None:
        if self.alive:
            self._send(message)

    def outputs(self, items: list[link.Output], now_s: float) -> None:
        for item in items:
            attempt = self.attempts.get(item.id)
            if attempt is not None:
                attempt.output(self, item, now_s)

    def status(self, status: link.Status) -> None:
        self.load = status.load
        if status.counters:
            self.counters = status.counters
        if status.memory is not None:
            self.memory = status.memory
        self._sent = self._sent_tokens = 0

    def view(self) -> NodeView:
        load = self.load
        return NodeView(
            id=self.id,
            layout=self.hello.layout,
            sequences=load.waiting + load.running + load.pulling + self._sent,
            waiting_tokens=load.waiting_tokens + self._sent_tokens,
            kv_used=max((group.used / group.total for group in load.groups if group.total), default=0.0),
            draining=load.draining,
            local_prefill_tokens=self.hello.local_prefill_tokens,
        )


class Group:
    """The nodes that serve one model (same name, same fingerprint): any of them may take over from any other."""

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self.info = text.info
        self.prefill: dict[str, Node] = {}
        self.decode: dict[str, Node] = {}
        self.waiting: dict[object, Callable[[], None]] = {}  # called when a node can be had
        self._turn = 0

    def nodes(self) -> list[Node]:
        return [*self.prefill.values(), *self.decode.values()]

    def turn(self) -> int:
        self._turn += 1
        return self._turn

    def serving(self) -> tuple[int, int]:
        """How many prefill and decode nodes take requests."""
        prefill = sum(not node.load.draining for node in self.prefill.values())
        return prefill, sum(not node.load.draining for node in self.decode.values())

    def wake(self) -> None:
        for callback in list(self.waiting.values()):
            callback()

    def announce(self) -> None:
        """Tells decode nodes which prefill nodes may be named as a source, so that they connect ahead of use."""
        for node in self.decode.values():
            sources = [p.source for p in self.prefill.values() if p.hello.layout == node.hello.layout]
            node.tell(link.Peers(sources))


class Registry:
    """All groups. The newest group of a name that has nodes is the one that new requests go to."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], Group] = {}
        self._by_id: dict[str, Node] = {}

    def nodes(self) -> list[Node]:
        return list(self._by_id.values())

    def get(self, node_id: str) -> Node | None:
        return self._by_id.get(node_id)

    def group(self, info: link.ModelInfo) -> Group | None:
        return self.groups.get((info.name, info.fingerprint))

    def add_group(self, text: TextModel) -> Group:
        """A model's text side; groups of the same name that have no nodes left give way."""
        key = (text.info.name, text.info.fingerprint)
        for other in [k for k, g in self.groups.items() if k[0] == key[0] and k != key and not g.nodes()]:
            del self.groups[other]
        return self.groups.setdefault(key, Group(text))

    def add(self, node: Node) -> None:
        """Its group must be there. The caller has removed an older node of the same id."""
        group = self.groups[(node.hello.model.name, node.hello.model.fingerprint)]
        self._by_id[node.id] = node
        (group.prefill if node.role == "prefill" else group.decode)[node.id] = node
        group.announce()
        group.wake()

    def remove(self, node: Node, why: str) -> None:
        """The node is gone: its attempts are told. Does nothing when it was removed before."""
        if self._by_id.get(node.id) is not node:
            return
        node.alive = False
        del self._by_id[node.id]
        group = self.groups.get((node.hello.model.name, node.hello.model.fingerprint))
        if group is not None:
            group.prefill.pop(node.id, None)
            group.decode.pop(node.id, None)
            if node.role == "prefill":
                group.announce()
        attempts, node.attempts = node.attempts, {}
        for attempt in attempts.values():
            attempt.lost(node, why)

    def status(self, node: Node, status: link.Status) -> None:
        draining = node.load.draining
        node.status(status)
        if draining and not status.load.draining:
            group = self.group(node.hello.model)
            if group is not None:
                group.wake()

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.groups))

    def find(self, name: str) -> Group | None:
        """The group to serve ``name`` now: the one with most complete sets of nodes, the newest of equals."""
        groups = [group for (other, _), group in self.groups.items() if other == name]
        return max(reversed(groups), key=_usefulness, default=None)


def _usefulness(group: Group) -> tuple[bool, int, int]:
    prefill, decode = group.serving()
    return decode > 0, min(prefill, decode), decode
