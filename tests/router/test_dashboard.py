"""The dashboard: what its events say, who may read them, and the page in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pd_serve.router.dashboard.page import MAX_WATCHERS
from pd_serve.router.dashboard.recent import KEPT_S, Recent, quantile
from pd_serve.router.metrics import Metrics
from tests.ports import free_port
from tests.router.browser import CHROMIUM, WHY_NOT, browser
from tests.router.conftest import StartNode, StartRouter, until

HOSTILE = '<img src="http://192.0.2.1/x" onerror="window.owned = 1"><script>window.owned = 1</script>'
in_browser = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)


@contextlib.asynccontextmanager
async def watch(http: httpx.AsyncClient, **options: Any) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    async with http.stream("GET", "/dashboard/events", **options) as answer:
        assert answer.status_code == 200, await answer.aread()

        async def events() -> AsyncIterator[tuple[str, Any]]:
            name = ""
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    yield name, json.loads(line[6:])

        yield events()


async def test_events_say_where_a_stream_runs_and_no_prompt(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    decode.counters = {
        "steps": 1.0, "pull_bytes": 4e9, "pull_bytes_nixl": 4e9, "pull_seconds": 2.0,
        "self_test_bytes_nixl": 8e6, "self_test_seconds_nixl": 0.001,
    }  # fmt: skip
    decode.hold_after = 4
    router = await start_router(prefill, decode)
    asked = asyncio.create_task(router.complete("a secret fox", max_tokens=9, user="someone"))
    await until(lambda: any(len(stream.outputs) == 4 for stream in router.router.shared.active), "four tokens")
    await until(lambda: all(node.counters for node in router.router.registry.nodes()), "a status of each")

    async with watch(router.http) as events:
        name, history = await anext(events)
        assert name == "history" and len(history["points"]) <= KEPT_S
        name, frame = await anext(events)
        assert name == "frame"
        assert [(node["id"], node["role"], node["state"]) for node in frame["nodes"]] == [
            (prefill.id, "prefill", "ready"),
            (decode.id, "decode", "ready"),
        ]
        [stream] = frame["streams"]
        assert (stream["prefill"], stream["decode"], stream["tokens"]) == (prefill.id, decode.id, 4)
        assert stream["phase"] == "decode" and stream["model"] == "tiny" and stream["age_s"] > 0
        assert "fox" not in json.dumps([history, frame])
        [lane] = frame["lanes"]
        assert (lane["lane"], lane["bytes_per_s"], lane["self_test_bytes_per_s"]) == ("nixl", 2e9, 8e9)
        assert lane["sources"] == [prefill.id]

        decode.hold.set()
        await asked
        later = [await anext(events) for _ in range(2)]
        assert [name for name, _ in later] == ["frame", "frame"]
        assert later[-1][1]["streams"] == []
        assert later[-1][1]["point"][0] > frame["point"][0] if frame["point"] else True
    await until(lambda: router.router.dashboard.watchers == 0, "the watcher is gone")


async def test_watchers_are_bounded_and_share_a_frame(start_router: StartRouter) -> None:
    router = await start_router(ready=False)
    made = 0
    describe = router.router.dashboard._describe

    def counted() -> dict[str, Any]:
        nonlocal made
        made += 1
        return describe()

    router.router.dashboard._describe = counted
    async with contextlib.AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(watch(router.http)) for _ in range(MAX_WATCHERS)]
        one_more = await router.http.get("/dashboard/events")
        assert one_more.status_code == 429 and one_more.json()["error"]["code"] == "too_many_watchers"
        for events in watchers:
            assert [(await anext(events))[0] for _ in range(3)] == ["history", "frame", "frame"]
        assert made <= 5
    await until(lambda: router.router.dashboard.watchers == 0, "all are gone")
    seen = made
    await asyncio.sleep(1.2)
    assert made == seen  # nobody watches: nothing is computed


async def test_keys_and_the_admin_listener(start_router: StartRouter) -> None:
    router = await start_router(ready=False, api_key=("key-1",))
    page = await router.http.get("/dashboard")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
    assert (await router.http.get("/dashboard/app.js")).status_code == 200
    assert (await router.http.get("/dashboard/events")).status_code == 401
    async with watch(router.http, headers={"Authorization": "Bearer key-1"}) as events:
        assert (await anext(events))[0] == "history"

    port = free_port()
    public = await start_router(ready=False, host="0.0.0.0", admin_port=port)
    for path in ("/dashboard", "/dashboard/app.js", "/dashboard/style.css", "/dashboard/events"):
        assert (await public.http.get(path)).status_code == 404, path
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as admin:
        assert (await admin.get("/dashboard/style.css")).status_code == 200
        async with watch(admin) as events:
            assert (await anext(events))[0] == "history"


async def test_a_watcher_does_not_keep_a_router_that_drains(start_router: StartRouter) -> None:
    router = await start_router(ready=False)
    async with watch(router.http) as events:
        await anext(events)
        router.router.begin_drain()
        async with asyncio.timeout(3):
            last = [frame async for _, frame in events][-1]
    assert last["draining"] is True


def test_points_are_differences_and_quantiles_of_what_came_lately() -> None:
    metrics = Metrics()
    recent = Recent(metrics, 1000.0)
    own = metrics.models["tiny"]
    for second in range(1, 40):
        if second <= 20:
            own.ttft.observe(0.07)
            metrics.counters["requests"]["/v1/completions", "200" if second % 2 else "500"] += 1
        recent.sample(1000.0 + second, streams=second)
    points = recent.points()
    assert [point[0] for point in points] == [1000.0 + second for second in range(1, 40)]
    assert points[10][1] == pytest.approx(0.075)  # the middle of its bucket
    assert points[10][5:] == [1.0, 0.0, 11] and points[11][6] == 1.0
    assert points[-1][1] is None and points[-1][5] == 0.0
    assert recent.points(1) == points[-1:]
    assert recent.last_minute()[0] == pytest.approx(0.075)
    assert quantile((1.0, 2.0), [0, 0, 5], 0.5) == 2.0


def test_a_sample_costs_next_to_nothing() -> None:
    metrics = Metrics()
    for name in ("one", "two"):
        metrics.models[name].ttft.observe(0.1)
    recent = Recent(metrics, 0.0)
    begun_s = time.process_time()
    for second in range(1000):
        recent.sample(float(second), 0)
    assert (time.process_time() - begun_s) / 1000 < 1e-3  # some 20 µs, once a second


@in_browser
async def test_the_page_in_a_browser(start_node: StartNode, start_router: StartRouter, tmp_path: Path) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", node_id=HOSTILE)
    decode.hold_after = 3
    router = await start_router(prefill, decode)
    port = int(router.url.rsplit(":", 1)[1])
    async with browser(tmp_path) as page:
        await page.open(router.url + "/dashboard")
        await page.sees("document.querySelectorAll('#nodes tbody tr').length === 2")
        assert await page.evaluate("!document.getElementById('streams-empty').hidden")
        names = await page.evaluate("[...document.querySelectorAll('#nodes tbody th')].map((cell) => cell.textContent)")
        assert names == [prefill.id, HOSTILE]

        asked = asyncio.create_task(router.complete(max_tokens=7))
        row = "document.querySelector('#streams tbody')?.innerText ?? ''"
        await page.sees(f"({row}).includes('3 of 7')")
        assert prefill.id in await page.evaluate(row) and HOSTILE in await page.evaluate(row)
        decode.hold.set()
        await asked
        await page.sees("!document.getElementById('streams-empty').hidden")
        await page.sees("document.querySelector('#plot-ttft path.a') !== null")

        await prefill.drain()
        await page.sees("document.querySelector('#nodes .pill').textContent === 'draining'")
        assert await page.evaluate("window.owned") is None
        assert await page.evaluate("document.querySelectorAll('img, body script').length") == 0
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.errors == []
        own = (router.url + "/", "data:,")
        assert page.asked and [url for url in page.asked if not url.startswith(own)] == []

        await router.stop()
        await page.sees("document.getElementById('connection').textContent === 'lost'")
        assert "trying again" in await page.evaluate("document.getElementById('notice').textContent")
        again = await start_router(ready=False, listen_port=port)
        await page.sees("document.getElementById('connection').textContent === 'live'")
        await page.sees("document.getElementById('nodes-empty').innerText.includes('pd-serve prefill --router')")
        assert again.router.dashboard.watchers == 1


@in_browser
async def test_the_page_asks_for_a_key(start_router: StartRouter, tmp_path: Path) -> None:
    router = await start_router(ready=False, api_key=("key-1",))
    async with browser(tmp_path) as page:
        await page.open(router.url + "/dashboard")
        await page.sees("!document.getElementById('door').hidden")

        async def give(key: str) -> None:
            await page.evaluate(f"document.getElementById('key').value = {key!r}")
            await page.evaluate("document.querySelector('#door button').click()")

        await give("key-2")
        await page.sees("document.getElementById('refused').textContent.includes('does not know that key')")
        assert await page.evaluate("document.getElementById('board').hidden && !sessionStorage.getItem('key')")
        await give("key-1")
        await page.sees("!document.getElementById('board').hidden && document.getElementById('door').hidden")
        assert await page.evaluate("sessionStorage.getItem('key')") == "key-1"
        assert not any("key-1" in url for url in page.asked)
        # Chromium itself says what got a 401.
        assert [error for error in page.errors if "401" not in error] == []
