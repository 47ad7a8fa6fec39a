"""When a link is given up, what a node is asked before that, and nodes that are taken away before they are linked."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pd_serve.config import RouterConfig
from pd_serve.router.backends.base import OWN, Place
from pd_serve.router.groups import Registry
from pd_serve.router.links import Links, _Entry
from pd_serve.router.nodes import Node
from pd_serve.wire import link
from tests.api import tiny
from tests.router.conftest import StartNode, StartRouter, until


@dataclass
class NotedLink:
    heard_s: float
    spoke_s: float
    patience: float = 1.0
    said: list[str] = field(default_factory=list)

    def abort(self, why: str) -> None:
        self.said.append(why)

    def ping(self) -> None:
        self.said.append("ping")


@pytest.mark.parametrize(
    ("socket_s", "engine_s", "step_s", "forgive", "said"),
    [
        (0.5, 0.5, 0.0, False, []),
        (2.0, 2.0, 0.0, False, ["ping"]),
        (3.5, 3.5, 0.0, False, ["silent for 3.5 s"]),
        (0.5, 5.5, 0.0, False, ["its engine was silent for 5.5 s"]),
        (0.5, 0.5, 9.0, False, []),  # a long step is no hang
        (0.5, 0.5, 11.0, False, ["its engine hangs: step 7 has run for 11.0 s"]),
        (9.0, 9.0, 0.0, True, []),  # the router itself slept, and has read nothing since
        (9.0, 9.0, 11.0, True, ["its engine hangs: step 7 has run for 11.0 s"]),
    ],
)
def test_when_a_link_is_given_up(
    socket_s: float, engine_s: float, step_s: float, forgive: bool, said: list[str]
) -> None:
    links = Links(RouterConfig(link_timeout_s=3.0, engine_timeout_s=5.0), Registry(), b"")
    hello = link.Hello(
        1, "d", "decode", "http://d", tiny.info(), "layout", "e", "tcp://x", "test", 0, link.Load(0, 0, 0, [])
    )
    node = Node(hello, lambda _: None)
    node.running = link.Running(7, 100, step_s, 10.0) if step_s else None
    now_s = time.monotonic()
    noted = NotedLink(now_s - socket_s, now_s - engine_s)
    links._check(noted, node, now_s, forgive=forgive)  # type: ignore[arg-type]
    assert noted.said == said
    links._check(noted, node, now_s, forgive=False)  # type: ignore[arg-type]
    assert noted.said == said * 2, "what was forgiven is forgotten"


async def test_the_watch_notices_that_the_router_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links(RouterConfig(), Registry(), b"")
    seen: list[bool] = []
    entry = _Entry(Place("http://d", OWN), static=True)
    entry.link = entry.node = SimpleNamespace()  # type: ignore[assignment]
    links._entries[entry.url] = entry
    monkeypatch.setattr(links, "_check", lambda *_, forgive: seen.append(forgive))
    watch = asyncio.create_task(links._watch())
    await until(lambda: seen, "a look")
    links._tick_s -= 10.0
    seen.clear()
    await until(lambda: seen, "another look")
    watch.cancel()
    assert seen[0]


async def test_a_role_that_nobody_knows_is_refused(start_node: StartNode, start_router: StartRouter) -> None:
    node = await start_node("referee")
    running = await start_router(ready=False)
    await running.http.post("/nodes", json={"url": node.url})
    (entry,) = await until(lambda: [u for u in running.router.links.unlinked() if u.state == "refused"], "refused")
    assert entry.reason == "its role 'referee' is unknown to this router: update the router"


async def test_a_node_that_is_taken_away_before_it_is_linked_is_tried_no_more(
    start_node: StartNode, start_router: StartRouter
) -> None:
    node = await start_node("referee")
    running = await start_router(ready=False)
    await running.http.post("/nodes", json={"url": node.url})
    await until(lambda: [u for u in running.router.links.unlinked() if u.state == "refused"], "refused")
    answer = await running.http.request("DELETE", "/nodes", json={"url": node.url})
    assert answer.json()["known"]
    await until(lambda: not running.router.links.unlinked(), "forgotten")
    answer = await running.http.request("DELETE", "/nodes", json={"url": node.url})
    assert not answer.json()["known"]
