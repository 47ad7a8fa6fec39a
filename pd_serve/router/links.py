"""One link a node: connected, greeted, watched, and connected again for nodes of the static list.

Owns when links begin and end; what a link is, its node's backend says (:mod:`pd_serve.router.backends`). Registered
nodes are forgotten when their link ends and come back by registering again. A link that is silent for too long (the
node answers no ping, or its engine no longer speaks) counts as lost: what ran there goes on elsewhere, and what such a
node still says later is never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from pd_serve.api.errors import APIError
from pd_serve.api.text_model import TextModel
from pd_serve.config import RouterConfig
from pd_serve.errors import ConfigError, PDServeError
from pd_serve.router.backends.base import OWN, Backend, Link, Place, Unfit
from pd_serve.router.backends.pdserve import PDServe
from pd_serve.router.backends.sglang import SGLang
from pd_serve.router.backends.vllm import VLLM
from pd_serve.router.discovery import follow
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.wire import link as wire

log = logging.getLogger(__name__)

_BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0)  # the last one for ever
_REFUSED_BACKOFF_S = (*_BACKOFF_S, 5.0, 10.0, 30.0, 60.0)  # for a node that answers and cannot be worked with
# Registered ones and listed ones. Far more than one router has tokens to carry for; each costs a socket and a task, and
# where strangers may register it is they who say what is dialled.
MAX_LINKS = 16_384
_TICK_S = 0.5
_PING_AFTER = 0.6  # of ``link_timeout_s``; idle engines speak more often than that by default
_STALL_S = 2.0  # a tick so late means that the router itself slept: no verdict on others then


class Unlinked(NamedTuple):
    url: str
    state: str
    reason: str


@dataclass
class _Entry:
    place: Place
    static: bool
    task: asyncio.Task[None] | None = None
    link: Link | None = None
    node: Node | None = None
    state: str = "connecting"
    reason: str = ""  # why the last try failed
    refused: bool = False  # the node was there, and it and this router cannot work together
    instance: str = ""  # of the node's process, as it registered
    again: asyncio.Event = field(default_factory=asyncio.Event)  # the next try need not wait

    @property
    def url(self) -> str:
        return self.place.url


class Links:
    def __init__(self, settings: RouterConfig, registry: Registry, secret: bytes) -> None:
        self._settings = settings
        self._registry = registry
        self._backends: dict[str, Backend] = {
            OWN: PDServe(settings, registry, secret),
            VLLM.kind: VLLM(settings, registry),
            SGLang.kind: SGLang(settings, registry),
        }
        self._entries: dict[str, _Entry] = {}
        self._complaints: dict[str, str] = {}
        self._tick_s = time.monotonic()
        self._watcher: asyncio.Task[None] | None = None
        self._lists: dict[str, set[str]] = {}  # of discovery, as far as they are linked to
        self._followers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())
        for place in self._settled():
            self.add(place.url, static=True, place=place)
        for where in self._settings.discover:
            follower = asyncio.create_task(follow(where, functools.partial(self.listed, where)), name=where)
            follower.add_done_callback(_follows_no_more)
            self._followers.append(follower)

    def _settled(self) -> list[Place]:
        """Those that settings name."""
        settings = self._settings
        found = [Place(url, OWN) for url in (*settings.prefill, *settings.decode)]
        for role, urls in (("prefill", settings.prefill_url), ("decode", settings.decode_url), ("both", settings.url)):
            found += [Place(url, settings.backend, role) for url in urls]
        return found

    async def close(self) -> None:
        tasks = [task for entry in self._entries.values() if (task := entry.task) is not None]
        tasks += self._followers
        tasks += [self._watcher] if self._watcher is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, url: str, *, static: bool = False, instance: str = "", place: Place | None = None) -> str:
        """Begins a link unless there is one; its state. ``instance``: of the node's process, where it registers itself.
        ``place``: where it is another engine's.

        A node that was refused is tried again at once where it was started anew, or somebody gave the order by hand.
        Raises APIError where there are too many.
        """
        url = url.rstrip("/")
        entry = self._entries.get(url)
        if entry is None:
            if not static and len(self._entries) >= MAX_LINKS:
                raise APIError(
                    503,
                    f"{MAX_LINKS} nodes are registered with this router: take some away, or start another router",
                    code="too_many_nodes",
                    retry_after_s=60,
                )
            entry = self._entries[url] = _Entry(place or Place(url, OWN), static, instance=instance)
            entry.task = asyncio.create_task(self._keep(entry))
        elif entry.node is None and (not instance or instance != entry.instance):
            entry.again.set()
        entry.instance = instance
        return entry.state

    def remove(self, url: str) -> bool:
        """A node leaves. Static ones are tried again, they may come back."""
        entry = self._entries.get(url.rstrip("/"))
        if entry is None:
            return False
        if entry.link is not None:
            entry.link.close("the node left")
        elif not entry.static and entry.task is not None:
            entry.task.cancel()
        return True

    def registered(self) -> dict[str, str]:
        """Nodes that registered themselves: instance by URL."""
        return {entry.url: entry.instance for entry in self._entries.values() if not entry.static}

    def listed(self, where: str, urls: dict[str, bool]) -> None:
        """What a list of discovery says now (see :meth:`Place.parse`): nodes that came are linked to, those that left
        are not tried again. With True a node is about to leave, and gets nothing new."""
        before, now = self._lists.get(where, set()), set[str]()
        for line, leaving in urls.items():
            place = Place.parse(line)
            url = place.url
            try:
                if place.backend == OWN:  # whose prompts nobody else is to read
                    self._settings.check_door(urlsplit(url).hostname or "", "discovered")
            except ConfigError as error:
                self._complain(url, str(error))
                continue
            now.add(url)
            entry = self._entries.get(url)
            if entry is None and not leaving:
                self.add(url, static=True, place=place)
            elif entry is not None:
                entry.static = True
                if entry.node is not None:
                    self._registry.leaving(entry.node, leaving)
        self._lists[where] = now
        for url in before - now:
            if not any(url in others for others in self._lists.values()):
                self.forget(url)

    def forget(self, url: str) -> None:
        """A node is listed no more: its link goes on to its own end, and is not begun again."""
        entry = self._entries.get(url)
        if entry is None or any(place.url == url for place in self._settled()):
            return
        entry.static = False
        if entry.node is None and entry.task is not None:
            entry.task.cancel()

    def unlinked(self) -> list[Unlinked]:
        """Nodes that are known and not linked."""
        return [Unlinked(e.url, e.state, e.reason) for e in self._entries.values() if e.node is None]

    # --- one link -------------------------------------------------------------------------------------

    async def _keep(self, entry: _Entry) -> None:
        failures = 0
        try:
            while True:
                linked = await self._once(entry)
                if not entry.static and not entry.refused:
                    return  # it comes back by registering; one that was refused would only be refused more often
                failures = 0 if linked else failures + 1
                backoff_s = _REFUSED_BACKOFF_S if entry.refused else _BACKOFF_S
                delay_s = backoff_s[min(failures, len(backoff_s) - 1)]
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(entry.again.wait(), delay_s * random.uniform(0.8, 1.2))
                    failures = 0
        finally:
            if self._entries.get(entry.url) is entry:
                del self._entries[entry.url]

    async def _once(self, entry: _Entry) -> bool:
        """Connects and serves until the link ends; whether it was ever in use."""
        entry.again.clear()
        if not entry.refused:
            entry.state = "connecting"  # else the reason stays readable while it is tried again
        link = None
        why = "the router ends"
        try:
            link = entry.link = await self._backends[entry.place.backend].open(entry.place)
            await self._prepare(link)
            if link.closed.done():
                raise ConnectionError(link.closed.result())
            node = entry.node = Node(link.hello, link.send)
            entry.state, entry.reason, entry.refused = "linked", "", False
            self._complaints.pop(entry.url, None)
            self._registry.add(node)
            link.begin(node)
            log.info("%s linked at %s", node.title, entry.url)
            why = await link.closed
            return True
        except (OSError, PDServeError, msgspec.DecodeError) as error:
            entry.reason = str(error) or type(error).__name__
            entry.refused = not isinstance(error, OSError)
            entry.state = "refused" if entry.refused else "unreachable"
            self._complain(entry.url, entry.reason)
            return False
        finally:
            left, entry.node, entry.link = entry.node, None, None
            if left is not None:
                log.info("%s unlinked: %s", left.title, why)
                self._registry.remove(left, why)
            if link is not None:
                link.close(why)

    def _complain(self, url: str, what: str) -> None:
        """Once for each cause: a node registers every few seconds."""
        if self._complaints.get(url) != what:
            if len(self._complaints) > 1000:
                self._complaints.clear()
            self._complaints[url] = what
            log.warning("cannot link to the node at %s: %s", url, what)

    async def _prepare(self, link: Link) -> None:
        """The model's text side is there, and no other link of the same node is. Raises Unfit."""
        greeting = link.hello
        if greeting.role not in wire.ROLES:
            raise Unfit(f"its role '{greeting.role}' is unknown to this router: update the router")
        self._check_unique(greeting)
        if not self._registry.knows(greeting.model):
            started_s = time.monotonic()
            bundle = await link.bundle()
            text = await asyncio.to_thread(lambda: TextModel(bundle, greeting.model))
            self._registry.add_group(text)
            log.info("tokenizer of '%s' loaded in %.2f s", greeting.model.name, time.monotonic() - started_s)
            self._check_unique(greeting)

    def _check_unique(self, greeting: wire.Hello) -> None:
        """A link that lives gives way to no newcomer: a node that started again has no old one."""
        old = self._registry.get(greeting.node_id)
        if old is not None:
            raise Unfit(
                f"node {greeting.node_id} is linked already, under {old.url}: list it once, or give each node its own "
                "--advertise-url"
            )

    # --- silence --------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        self._tick_s = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            stalled = now_s - self._tick_s > _TICK_S + _STALL_S
            self._tick_s = now_s
            for entry in list(self._entries.values()):
                if entry.link is not None and entry.node is not None:
                    self._check(entry.link, entry.node, now_s, forgive=stalled)

    def _check(self, link: Link, node: Node, now_s: float, *, forgive: bool) -> None:
        if forgive:
            # What the node sent while this process slept is still unread.
            link.heard_s = link.spoke_s = now_s
        silent_s = now_s - link.heard_s
        link_timeout_s = link.patience * self._settings.link_timeout_s
        if silent_s > link_timeout_s:
            link.abort(f"silent for {silent_s:.1f} s")
        elif now_s - link.spoke_s > link.patience * self._settings.engine_timeout_s:
            link.abort(f"its engine was silent for {now_s - link.spoke_s:.1f} s")
        elif node.running is not None and node.running.seconds > node.running.limit_s:
            link.abort(f"its engine hangs: step {node.running.step} has run for {node.running.seconds:.1f} s")
        elif silent_s > _PING_AFTER * link_timeout_s:
            link.ping()


def _follows_no_more(follower: asyncio.Task[None]) -> None:
    if not follower.cancelled() and (error := follower.exception()) is not None:
        log.critical("%s is followed no more: restart the router", follower.get_name(), exc_info=error)
