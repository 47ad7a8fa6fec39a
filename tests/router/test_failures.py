"""Nodes refuse, fail, vanish, pause, leave and come back; clients leave. Streams go on exactly or end clearly."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire import link
from tests.api import tiny
from tests.router.conftest import Running, StartNode, StartRouter, idle, until
from tests.router.scripted_node import ScriptedNode, expected

TOKENIZER = TextTokenizer(tiny.byte_level())
PROMPT = TOKENIZER.encode("the fox", add_special_tokens=True)
BUSY = link.Failure("refused", "256 requests wait already", retry_after_s=3.0)


class Stream:
    """A streamed completion in the background: what came so far, and how it ended."""

    def __init__(self, running: Running, max_tokens: int = 40, **body: object) -> None:
        self.tokens: list[int] = []
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.done = False  # [DONE] came
        self.body = {"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0,
                     "stream": True, "return_token_ids": True, **body}  # fmt: skip
        self.task = asyncio.create_task(self._run(running))

    async def _run(self, running: Running) -> None:
        async with running.http.stream("POST", "/v1/completions", json=self.body) as answer:
            self.status = answer.status_code
            if answer.status_code != 200:
                self.error = json.loads(await answer.aread())["error"]
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert not self.done and self.error is None
                    self.error = event.get("error")
                    for choice in event.get("choices", ()):
                        self.tokens += choice["token_ids"]

    async def wait(self) -> Stream:
        await asyncio.wait_for(self.task, 20)
        return self


async def four(start_node: StartNode, token_s: float = 0.005) -> list[ScriptedNode]:
    """Two prefill nodes, then two decode nodes."""
    return [await start_node(role, token_s=token_s) for role in ("prefill", "prefill", "decode", "decode")]


async def busy(nodes: list[ScriptedNode]) -> ScriptedNode:
    node: ScriptedNode = await until(lambda: next((n for n in nodes if n.running), None), "a busy node")
    return node


# --- nodes that are lost ------------------------------------------------------------------------------


async def test_a_decode_node_dies_in_mid_stream(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    streams = [Stream(running) for _ in range(4)]
    await until(lambda: all(len(s.tokens) > 5 for s in streams), "tokens")
    await (await busy(nodes[2:])).stop()
    for stream in streams:
        assert (await stream.wait()).tokens == expected(PROMPT, 40)
        assert stream.done and stream.error is None
    resumed = [s for n in nodes for s in n.submits if s.num_output]
    assert resumed and all(len(s.tokens) // 4 == len(PROMPT) + s.num_output for s in resumed)
    await until(idle(*nodes), "idle")
    retries = (await running.http.get("/metrics")).text
    assert 'pd_serve_retries_total{reason="lost"}' in retries


@pytest.mark.parametrize("moment", ["before its token", "before the KV arrived", "after"])
async def test_a_prefill_node_dies(start_node: StartNode, start_router: StartRouter, moment: str) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    if moment == "before its token":
        for node in nodes[:2]:
            node.hold.clear()
    elif moment == "before the KV arrived":
        for node in nodes[2:]:
            node.hold.clear()
    stream = Stream(running)
    await until(lambda: any(n.submits for n in nodes[:2]) and any(n.submits for n in nodes[2:]), "submits")
    if moment != "before its token":
        await until(lambda: len(stream.tokens) > (1 if moment == "after" else 0), "tokens")
    victim = next(n for n in nodes[:2] if n.submits)
    before = sum(len(n.submits) for n in nodes[2:])
    await victim.stop()
    if moment == "after":
        await stream.wait()
        assert sum(len(n.submits) for n in nodes[2:]) == before  # it did not matter
    for node in nodes:
        node.hold.set()
    assert (await stream.wait()).tokens == expected(PROMPT, 40)
    assert stream.done
    await until(idle(*nodes), "idle")


async def test_without_another_node_there_is_one_clear_error(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.01)
    running = await start_router(prefill, decode, node_wait_s=0.3)
    stream = Stream(running, 200)
    whole = asyncio.create_task(running.post(prompt=PROMPT, max_tokens=200))
    await until(lambda: len(stream.tokens) > 3, "tokens")
    await decode.stop()
    await stream.wait()
    assert stream.status == 200 and not stream.done
    assert stream.error is not None and "decode node" in stream.error["message"]
    assert stream.error["type"] == "service_unavailable_error" and stream.error["request_id"]
    assert (await whole).status_code == 503
    assert (await running.http.get("/ready")).status_code == 503
    refused = await running.post(prompt=PROMPT)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert (await running.http.get("/v1/models")).json()["data"][0]["id"] == "tiny"  # its prefill node is there
    await until(idle(prefill), "idle")


async def test_a_stream_waits_for_a_node_to_come_back(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.01)
    running = await start_router(prefill, decode, node_wait_s=5.0)
    stream = Stream(running)
    await until(lambda: len(stream.tokens) > 3, "tokens")
    port = decode.port
    await decode.stop()
    await until(lambda: len(running.router.registry.nodes()) == 1, "the loss noticed")
    fresh = Stream(running)  # has had no node yet, and waits too
    await asyncio.sleep(0.3)
    again = await start_node("decode", port=port, node_id=decode.id)
    again.epoch = "epoch-2"
    for one in (stream, fresh):
        assert (await one.wait()).tokens == expected(PROMPT, 40)
        assert one.done
    assert again.submits[0].source is not None


async def test_attempts_are_bounded(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    decode.fail = [link.Failure("internal", "out of luck")] * 10
    running = await start_router(prefill, decode, max_attempts=3)
    answer = await running.post(prompt=PROMPT)
    assert answer.status_code == 502
    assert "3 attempts" in answer.json()["error"]["message"] and "out of luck" in answer.json()["error"]["message"]
    assert len(decode.submits) == 3
    await until(idle(prefill, decode), "idle")


async def test_a_paused_node_is_left_and_comes_back(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node, token_s=0.01)
    running = await start_router(*nodes)
    streams = [Stream(running) for _ in range(2)]
    await until(lambda: all(len(s.tokens) > 3 for s in streams), "tokens")
    paused = await busy(nodes[2:])
    began_s = time.monotonic()
    paused.pause()
    for stream in streams:
        assert (await stream.wait()).tokens == expected(PROMPT, 40)
    assert time.monotonic() - began_s < 5
    paused.hold.set()
    paused.silent_engine = False
    await until(lambda: len(running.router.registry.nodes()) == 4, "it is linked again")
    await until(idle(*nodes), "idle")


async def test_an_engine_that_is_silent_behind_a_living_node_is_lost(
    start_node: StartNode, start_router: StartRouter
) -> None:
    nodes = await four(start_node, token_s=0.01)
    running = await start_router(*nodes, engine_timeout_s=1.0)
    stream = Stream(running)
    await until(lambda: len(stream.tokens) > 3, "tokens")
    stuck = await busy(nodes[2:])
    stuck.hold_after, stuck.silent_engine = 0, True
    assert (await stream.wait()).tokens == expected(PROMPT, 40)


async def test_garbage_from_a_node_ends_its_link_only(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    stream = Stream(running)
    await until(lambda: len(stream.tokens) > 3, "tokens")
    victim = await busy(nodes[2:])
    for connection in list(victim._connections):
        await connection.send(b"\xc1 garbage")
    assert (await stream.wait()).tokens == expected(PROMPT, 40)
    await until(lambda: len(running.router.registry.nodes()) == 4, "linked again")


# --- nodes that fail or refuse ------------------------------------------------------------------------


async def test_a_failed_transfer_is_tried_on_another_node(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    failure = link.Failure("transfer", "peer_lost: prefill-0 stopped answering")
    for node in nodes[2:]:
        node.fail = [failure]
    assert (await running.complete(PROMPT, return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)
    tried = [[s.id for s in node.submits] for node in nodes[2:]]
    assert all(tried)  # the other decode node was asked before the first again
    assert sum(map(len, tried)) == 3
    local = next(s for n in nodes[2:] for s in n.submits if s.source is None)
    assert local.num_output in (0, 1, 2)  # after two failed transfers the decode node computes the prompt itself
    await until(idle(*nodes), "idle")


async def test_a_failed_transfer_with_one_pair_only(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    decode.fail = [link.Failure("transfer", "expired: the lease had ended")]
    running = await start_router(prefill, decode)
    assert (await running.complete(PROMPT, return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)
    assert len({s.id for s in decode.submits}) == 2
    await until(idle(prefill, decode), "idle")


@pytest.mark.parametrize("role", [0, 2])
async def test_a_refusal_is_taken_to_another_node(start_node: StartNode, start_router: StartRouter, role: int) -> None:
    nodes = await four(start_node)
    nodes[role].refuse = BUSY
    running = await start_router(*nodes)
    for _ in range(6):
        assert (await running.complete(PROMPT, return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)
    assert nodes[role].submits
    await until(idle(*nodes), "idle")


@pytest.mark.parametrize("stream", [False, True])
async def test_when_all_refuse_it_is_429(start_node: StartNode, start_router: StartRouter, stream: bool) -> None:
    nodes = await four(start_node)
    for node in nodes[2:]:
        node.refuse = BUSY
    running = await start_router(*nodes)
    answer = await running.post(prompt=[PROMPT, PROMPT], n=2, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] in ("3", "4", "5")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    await until(idle(*nodes), "idle")


async def test_a_stream_that_has_begun_waits_for_full_nodes(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    stream = Stream(running)
    await until(lambda: len(stream.tokens) > 3, "tokens")
    victim = await busy(nodes[2:])
    other = nodes[5 - nodes.index(victim)]
    other.refuse = link.Failure("refused", "full", retry_after_s=0.2)
    await victim.stop()
    await until(lambda: len([s for s in other.submits if s.num_output]) >= 2, "it was refused twice")
    other.refuse = None
    assert (await stream.wait()).tokens == expected(PROMPT, 40)


async def test_what_a_node_calls_invalid_is_a_400(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    prefill.fail = [link.Failure("invalid", "the prompt needs 900 blocks, this node has 64: shorten it")]
    running = await start_router(prefill, decode)
    answer = await running.post(prompt=PROMPT)
    assert answer.status_code == 400 and "900 blocks" in answer.json()["error"]["message"]
    await until(idle(prefill, decode), "idle")


@pytest.mark.slow
async def test_no_progress_is_a_504(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode, request_timeout_s=1.0)
    decode.hold_after = 3
    stream = Stream(running)
    await stream.wait()
    assert stream.tokens == expected(PROMPT, 3)
    assert stream.error is not None and stream.error["code"] == "timeout" and not stream.done
    prefill.hold.clear()
    assert (await running.post(prompt=PROMPT)).status_code == 504
    prefill.hold.set()
    decode.hold.set()
    await until(idle(prefill, decode), "idle")


# --- local prefill, disagreements ---------------------------------------------------------------------


async def test_a_decode_node_that_computes_the_prompt_itself(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    prefill.hold.clear()
    decode.local = True
    running = await start_router(prefill, decode)
    assert (await running.complete(PROMPT, return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)
    assert prefill.aborted == [decode.submits[0].id]
    await until(idle(prefill, decode), "idle")


async def test_two_nodes_that_disagree_on_the_first_token(start_node: StartNode, start_router: StartRouter) -> None:
    """The client has the prefill node's; the decode node, computing for itself, found another at a near tie."""
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.05)
    decode.local = True
    running = await start_router(prefill, decode)
    other = 7
    prefill.first_token = other
    decode.hold.clear()
    stream = Stream(running, 8)
    await until(lambda: stream.tokens == [other], "the first token")
    decode.hold.set()
    assert (await stream.wait()).tokens == [other, *expected([*PROMPT, other], 7)]
    assert decode.submits[-1].num_output == 1


# --- clients that leave -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["queued", "running"])
async def test_a_client_that_leaves_frees_both_nodes(
    start_node: StartNode, start_router: StartRouter, stream: bool, moment: str
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.01)
    if moment == "queued":
        prefill.hold.clear()
    running = await start_router(prefill, decode)
    requests = [asyncio.create_task(running.post(prompt=PROMPT, max_tokens=400, stream=stream, n=2)) for _ in range(3)]
    await until(lambda: len(decode.running) == 6, "six streams")
    if moment == "running":
        await until(lambda: not prefill.running, "prefilled")
    left_s = time.monotonic()
    for request in requests:
        request.cancel()
    await until(idle(prefill, decode), "idle", 1.0)
    assert time.monotonic() - left_s < 1
    await until(lambda: not running.router.shared.active, "no stream left")
    metrics = (await running.http.get("/metrics")).text
    assert 'pd_serve_requests_total{endpoint="/v1/completions",status="499"} 3.0' in metrics
    assert 'pd_serve_aborts_total{reason="client"} 6.0' in metrics


# --- registration, draining ---------------------------------------------------------------------------


async def test_nodes_register_leave_and_come_back(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(ready=False, min_prefill=1, min_decode=1)
    assert (await running.post(prompt="x")).status_code == 503
    assert (await running.http.get("/v1/models")).json()["data"] == []
    for _ in range(2):
        for node in (prefill, decode):
            answer = await running.http.post("/nodes", json={"url": node.url + "/"})
            assert answer.status_code == 200 and answer.json()["url"] == node.url
    await running.ready()
    assert (await running.http.post("/nodes", json={"url": decode.url})).json()["state"] == "linked"
    await running.complete()
    await running.http.request("DELETE", "/nodes", json={"url": decode.url})
    await until(lambda: len(running.router.registry.nodes()) == 1, "left")
    assert len((await running.http.get("/v1/status")).json()["nodes"]) == 1
    await running.http.post("/nodes", json={"url": decode.url})
    await running.ready()
    decode.cut()
    await until(lambda: len(running.router.registry.nodes()) == 1, "lost")
    await until(lambda: not running.router.links.unlinked(), "forgotten")
    await running.http.post("/nodes", json={"url": decode.url})
    await running.ready()
    await running.complete()
    for url in ("", "ftp://x", "http://", "http://[", "http://x:0", "http://x:99999"):
        answer = await running.http.post("/nodes", json={"url": url})
        assert answer.status_code == 400, url


async def test_a_draining_node_gets_nothing_new(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    await nodes[0].drain()
    await nodes[2].drain()
    registry = running.router.registry
    await until(lambda: sum(n.load.draining for n in registry.nodes()) == 2, "draining seen")
    for _ in range(6):
        await running.complete()
    assert not nodes[0].submits and not nodes[2].submits
    states = {n["id"]: n["state"] for n in (await running.http.get("/v1/status")).json()["nodes"]}
    assert states[nodes[0].id] == states[nodes[2].id] == "draining"


async def test_decode_nodes_go_on_alone_when_prefill_nodes_drain(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    await prefill.drain()
    await until(lambda: any(n.load.draining for n in running.router.registry.nodes()), "draining seen")
    assert (await running.complete(return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)


async def test_decode_nodes_learn_of_prefill_nodes(start_node: StartNode, start_router: StartRouter) -> None:
    decode, first = await start_node("decode"), await start_node("prefill")
    running = await start_router(decode, first)
    second = await start_node("prefill")
    await running.http.post("/nodes", json={"url": second.url})
    await until(
        lambda: [[s.node_id for s in p.sources] for p in decode.peers] == [[first.id], [second.id]], "each once"
    )


async def test_a_node_of_another_version_is_refused(
    start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    decode = await start_node("decode")
    decode.link_version = 99
    running = await start_router(decode, ready=False)
    await until(lambda: "version 99" in caplog.text, "a word about it")
    await asyncio.sleep(0.5)
    assert caplog.text.count("version 99") == 1
    assert not running.router.registry.nodes()
    decode.link_version = link.LINK_VERSION
    await running.ready()


async def test_a_node_under_two_urls_is_linked_once(start_node: StartNode, start_router: StartRouter) -> None:
    decode = await start_node("decode")
    running = await start_router(decode)
    await running.http.post("/nodes", json={"url": decode.url.replace("127.0.0.1", "localhost")})
    await asyncio.sleep(0.3)
    assert len(running.router.registry.nodes()) == 1
    await running.complete()


async def test_the_router_ends_its_streams_in_words(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.01)
    running = await start_router(prefill, decode, drain_timeout_s=0.3)
    short, long = Stream(running, 10), Stream(running, 400)
    whole = asyncio.create_task(running.post(prompt=PROMPT, max_tokens=400))
    await until(lambda: len(long.tokens) > 3, "tokens")
    running.router.begin_drain()
    assert (await short.wait()).done
    await long.wait()
    assert long.error is not None and long.error["code"] == "shutting_down" and not long.done
    assert (await whole).status_code == 503
    assert (await running.http.get("/ready")).json()["reason"] == "draining"
    await until(idle(prefill, decode), "idle")


async def test_rolling_upgrade_to_another_fingerprint(start_node: StartNode, start_router: StartRouter) -> None:
    old = [await start_node(role) for role in ("prefill", "decode")]
    running = await start_router(*old)
    info, bundle = tiny.info(fingerprint="f2"), tiny.bundle(fingerprint="f2")
    new = [await start_node(role, info=info, bundle=bundle) for role in ("prefill", "decode")]
    for node in new:
        await running.http.post("/nodes", json={"url": node.url})
    await until(lambda: len(running.router.registry.nodes()) == 4, "all linked")
    for _ in range(4):
        await running.complete()
    for node in old:
        await node.stop()
    await until(lambda: len(running.router.registry.nodes()) == 2, "the old ones gone")
    await running.complete()
    assert all(s.source is None or s.source.node_id == new[0].id for s in new[1].submits)
    assert all(s.source is None or s.source.node_id == old[0].id for s in old[1].submits)
    assert len((await running.http.get("/v1/models")).json()["data"]) == 1
