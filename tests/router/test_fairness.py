"""Who is served under load: what can make its objective, keys within their share, and what is urgent first."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from pd_serve.wire import link
from tests.router.conftest import Running, StartNode, StartRouter, until
from tests.router.test_nodes import Work, make, submit


def report(seconds: float, tokens: float, steps: float) -> link.Status:
    counters = {"step_seconds": seconds, "computed_tokens": tokens, "steps": steps}
    return link.Status(link.Load(0, 0, 0, []), counters, last_submit=1 << 20)


def test_how_fast_a_node_computes_prompts() -> None:
    node = make("prefill")
    node.status(report(10.0, 9000, 100))
    assert node.tokens_a_second == 0.0, "since the engine's start: nothing lately"
    node.status(report(11.0, 14_000, 105))
    assert node.tokens_a_second == 5000
    node.status(report(21.0, 14_100, 205))
    assert node.tokens_a_second == 5000, "a token a step: these say nothing of prompts"
    node.status(report(22.0, 16_100, 207))
    assert 2000 < node.tokens_a_second < 5000


async def test_what_cannot_make_its_objective_is_refused_at_once(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode, ttft_objective_ms=2000.0)
    node = next(node for node in running.router.registry.nodes() if node.id == prefill.id)
    await running.complete()  # no rate is known
    node.computed(1000.0, 1.0)
    await running.complete()
    for i in range(20):  # a status of the node's own may come in between, and say that nothing is queued
        node.submit(Work(f"much {i}"), submit(f"much {i}", 5000))
        seen = len(prefill.submits)
        refused = await running.post(prompt="the fox", max_tokens=8)
        if refused.status_code != 200:
            break
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
    assert 3 <= int(refused.headers["retry-after"]) <= 5
    await until(lambda: len(prefill.submits) == seen + 1, "what the test sent alone")
    node.rated_s -= 31.0  # all would be refused for ever by what it did then
    await running.complete()


async def test_a_key_has_its_share_and_others_have_theirs(start_node: StartNode, start_router: StartRouter) -> None:
    decode = await start_node("decode")
    running = await start_router(decode, api_key=("sk-1", "sk-2"), max_concurrent_per_key=2)
    decode.hold.clear()

    async def ask(key: str, path: str = "/v1/completions") -> httpx.Response:
        body = {"model": "tiny", "prompt": "the fox", "max_tokens": 4}
        return await running.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    first = [asyncio.create_task(ask("sk-1")) for _ in range(2)]
    await until(lambda: len(decode.running) == 2, "both run")
    refused = await ask("sk-1")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert (await running.http.get("/v1/models", headers={"Authorization": "Bearer sk-1"})).status_code == 200
    other = asyncio.create_task(ask("sk-2"))
    await until(lambda: len(decode.running) == 3, "the other key's runs")
    decode.hold.set()
    assert [(await one).status_code for one in (*first, other)] == [200] * 3
    assert (await ask("sk-1")).status_code == 200, "its share is free again"


@pytest.mark.parametrize(("given", "sent"), [(None, 0), (-3, -3), (10**9, 1000)])
async def test_priorities_reach_the_nodes(
    start_node: StartNode, start_router: StartRouter, given: int | None, sent: int
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running: Running = await start_router(prefill, decode)
    await running.complete(priority=given)
    assert [one.priority for one in (*prefill.submits, *decode.submits)] == [sent, sent]
