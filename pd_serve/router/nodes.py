"""A node that the router is linked to: what it last said, what is in flight on it, and what placement sees of it.

Knows no network: a node is written to through the function that its link gave it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from pd_serve.router.field import NodeView
from pd_serve.wire import link
from pd_serve.wire.counted import COMPUTED_TOKENS, STEP_SECONDS, STEPS
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)

_PROMPT_STEP_TOKENS = 128
_RATED_S = 30.0  # for so long a node is taken to compute as fast as it was last seen to
_NEW = 0.3  # the share of what was seen last in a rate
MAX_MET = 16  # sources that a decode node is told of before it needs them; it may come to keep more


class Attempt(Protocol):
    """One attempt of a stream, as its nodes' links see it. None of its methods raises."""

    id: str

    def output(self, node: Node, output: link.Output, now_s: float) -> None: ...

    def lost(self, node: Node, why: str) -> None: ...


class Node:
    """A linked node. ``attempts``: what it works on for this router; frames for other ids are late and ignored.

    Nothing is learnt from writing to it: what it did not get its link's end will tell.
    """

    def __init__(self, hello: link.Hello, send: Callable[[link.ToNode], None]) -> None:
        self.hello = hello
        self.id = hello.node_id
        self.url = hello.url
        self.host = urlsplit(hello.url).hostname
        self.leaving = False  # as somebody else says
        self._take(hello.load)
        self.counters: dict[str, float] = {}
        self.tokens_a_second = 0.0  # of prompts that it computed lately; 0: not seen yet
        self.rated_s = 0.0  # when that was last seen, by time.monotonic
        self.memory: MemoryReport | None = None
        self.running: link.Running | None = None
        self.misfits: dict[str, str] = {}
        self.lanes: dict[str, float] = {}  # decode: prompt tokens a second, by source
        self.attempts: dict[str, Attempt] = {}
        self.alive = True
        self._send = send
        self.changed: Callable[[Node], None] = _nobody  # told whenever its view may be another one
        self.prefix_frame: int | None = None  # the last frame about what it has cached; None: it has said nothing yet
        self.met: dict[str, None] = {}  # decode: the last sources that it was told of, or was to read from
        self._numbers = itertools.count(1)
        # Submits that no status includes yet: number and prompt tokens to be computed here, by attempt.
        self._unseen: dict[str, tuple[int, int]] = {}
        self._unseen_tokens = 0

    @property
    def role(self) -> str:
        return self.hello.role

    @property
    def prefills(self) -> bool:
        return self.role != "decode"

    @property
    def decodes(self) -> bool:
        return self.role != "prefill"

    @property
    def title(self) -> str:
        """For people."""
        return f"node {self.id}" if self.prefills and self.decodes else f"{self.role} node {self.id}"

    @property
    def source(self) -> link.Source:
        return link.Source(self.id, self.hello.epoch, self.hello.peer_addresses)

    def expect(self, attempt: Attempt) -> None:
        """The attempt will be submitted here, or is: it is told when the node is lost."""
        self.attempts[attempt.id] = attempt

    def submit(self, attempt: Attempt, submit: link.Submit, cached: int = 0) -> bool:
        """Whether it could be written; a link that is closing takes it too, and tells the attempt when it ends.

        ``cached``: prompt tokens that it is thought to have.
        """
        self.expect(attempt)
        number = next(self._numbers)
        # A decode node with a source does not compute the prompt.
        tokens = 0 if submit.source is not None else len(submit.tokens) // 4 - cached
        self._unseen[attempt.id] = number, tokens
        self._unseen_tokens += tokens
        if submit.source is not None:
            self.meet(submit.source.node_id)
        self.changed(self)
        submit.number = number
        return self.tell(submit)

    def release(self, attempt: Attempt, *, abort: bool) -> None:
        """The attempt has no part here any more; with ``abort`` the node has to be told so."""
        if self.attempts.pop(attempt.id, None) is not None and abort:
            self.tell(link.Abort([attempt.id]))
        unseen = self._unseen.pop(attempt.id, None)
        if unseen is not None:
            self._unseen_tokens -= unseen[1]
            self.changed(self)

    def meet(self, source_id: str) -> bool:
        """It is connected to the source from now on; whether that is new."""
        new = source_id not in self.met
        self.met[source_id] = None
        if len(self.met) > MAX_MET:
            del self.met[next(iter(self.met))]
        return new

    def tell(self, message: link.ToNode) -> bool:
        if not self.alive:
            return False
        try:
            self._send(message)
        except Exception:
            log.exception("cannot write a %s to node %s", type(message).__name__, self.id)
            return False
        return True

    def outputs(self, items: list[link.Output], now_s: float) -> None:
        for item in items:
            attempt = self.attempts.get(item.id)
            if attempt is not None:
                attempt.output(self, item, now_s)

    def status(self, status: link.Status) -> None:
        self._take(status.load)
        self.running = status.running
        self.misfits = status.misfits
        self.lanes = status.lanes
        if status.counters:
            self._learn_rate(status.counters)
            self.counters = status.counters
        if status.memory is not None:
            self.memory = status.memory
        # by number: the first that is not included ends it
        for id in list(takewhile(lambda id: self._unseen[id][0] <= status.last_submit, self._unseen)):
            self._unseen_tokens -= self._unseen.pop(id)[1]
        self.changed(self)

    def _learn_rate(self, counters: dict[str, float]) -> None:
        """Of steps that are mostly prompts: others take as long for fewer tokens."""

        def since(name: str) -> float:
            return counters.get(name, 0.0) - self.counters.get(name, 0.0)

        steps, seconds, tokens = since(STEPS), since(STEP_SECONDS), since(COMPUTED_TOKENS)
        if self.counters and steps > 0 and tokens >= _PROMPT_STEP_TOKENS * steps:
            self.computed(tokens, seconds)

    def computed(self, tokens: float, seconds: float) -> None:
        """So many tokens of prompts in so much time, without waiting."""
        if tokens >= _PROMPT_STEP_TOKENS and seconds > 0:
            rate = tokens / seconds
            share = _NEW if self.tokens_a_second and self.rated_lately else 1.0
            self.rated_s = time.monotonic()
            self.tokens_a_second += (rate - self.tokens_a_second) * share

    @property
    def rated_lately(self) -> bool:
        """What is known of its rate says something of now."""
        return time.monotonic() - self.rated_s <= _RATED_S

    def _take(self, load: link.Load) -> None:
        self.load = load if not self.leaving else msgspec.structs.replace(load, draining=True)
        self._kv_used = max((group.used / group.total for group in load.groups if group.total), default=0.0)
        self._room = _room(load)

    def view(self) -> NodeView:
        load, sent = self.load, len(self._unseen)
        return NodeView(
            id=self.id,
            layout=self.hello.layout,
            sequences=load.waiting + load.running + load.pulling + sent,
            waiting_tokens=load.waiting_tokens + self._unseen_tokens,
            kv_used=self._kv_used,
            draining=load.draining,
            local_prefill_tokens=self.hello.local_prefill_tokens,
            max_model_len=self.hello.model.max_model_len,
            full=0 < load.max_queue <= load.queued + sent,
            queueing=load.queue_wait_s > 0 or load.queued + sent > self._room,
            queue_wait_s=load.queue_wait_s,
            met=self.met,
            tokens_a_second=self.tokens_a_second,
            lanes=self.lanes,
        )


def _nobody(_: Node) -> None:
    """No group has it yet."""


def _room(load: link.Load) -> float:
    """How many more sequences find memory, judged by those that have some."""
    holders = load.running + load.pulling
    if not holders:
        return float("inf")
    return min(
        (holders * (group.total - group.used) / group.used for group in load.groups if group.used),
        default=float("inf"),
    )
