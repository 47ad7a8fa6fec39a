"""Room comes before the first token, work done is kept, misfits and failing nodes get nothing, nodes may change."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from pd_serve.wire import link
from tests.api import tiny
from tests.router.conftest import Running, StartNode, StartRouter, idle, until
from tests.router.scripted_node import ScriptedNode, expected
from tests.router.test_failures import BUSY, PROMPT, Stream, four


async def told(running: Running, node: ScriptedNode, **load: float) -> None:
    """The router has a status of ``node`` with these values."""
    for name, value in load.items():
        setattr(node, name, value)

    def seen() -> bool:
        known = running.router.registry.get(node.id)
        return known is not None and all(getattr(known.load, name) == value for name, value in load.items())

    await until(seen, "a status")


# --- acceptance -----------------------------------------------------------------------------------------


async def test_the_first_token_waits_for_the_decode_nodes_word(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    decode.accept.clear()
    streams = [Stream(running) for _ in range(2)]
    await until(lambda: len(prefill.submits) == 2 and not prefill.running, "prompts computed")
    await asyncio.sleep(0.1)
    assert not any(stream.tokens or stream.status for stream in streams)
    decode.refuse = BUSY
    decode.accept.set()
    for stream in streams:
        await stream.wait()
        assert stream.status == 429 and not stream.tokens
    assert running.router.metrics.counters["attempts"]["pair",] == 2
    decode.refuse = None
    assert (await Stream(running).wait()).tokens == expected(PROMPT, 40)
    await until(idle(prefill, decode), "idle")


async def test_a_refusal_keeps_what_is_computed(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    for node in nodes[2:]:
        node.accept.clear()
    stream = Stream(running)
    await until(lambda: any(n.submits for n in nodes[:2]) and not any(n.running for n in nodes[:2]), "computed")
    first = next(node for node in nodes[2:] if node.submits)
    first.refuse = BUSY
    for node in nodes[2:]:
        node.accept.set()
    assert (await stream.wait()).tokens == expected(PROMPT, 40) and stream.status == 200
    assert sum(len(node.submits) for node in nodes[:2]) == 1
    (refused,), (taken,) = nodes[2].submits, nodes[3].submits
    assert refused.id == taken.id and refused.source == taken.source
    await until(idle(*nodes), "idle")


async def test_where_requests_queue_the_decode_node_is_asked_first(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    await told(running, decode, queue_wait_s=7.0)
    decode.accept.clear()
    stream = Stream(running)
    await until(lambda: decode.submits, "asked")
    await asyncio.sleep(0.1)
    assert not prefill.submits
    decode.accept.set()
    assert (await stream.wait()).tokens == expected(PROMPT, 40)
    decode.refuse = link.Failure("refused", "full", retry_after_s=3.0)
    answers = await asyncio.gather(*(running.post(prompt=PROMPT) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {429}
    assert all(7 <= int(answer.headers["retry-after"]) <= 11 for answer in answers)
    assert len(prefill.submits) == 1  # no prompt was computed for nothing
    await until(idle(prefill, decode), "idle")


async def test_a_lost_prefill_node_is_noticed_while_the_decode_node_is_asked(
    start_node: StartNode, start_router: StartRouter
) -> None:
    first, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(first, decode)
    await told(running, decode, queue_wait_s=7.0)
    decode.accept.clear()
    stream = Stream(running)
    await until(lambda: decode.submits, "asked")
    second = await start_node("prefill")
    await running.http.post("/nodes", json={"url": second.url})
    await running.http.request("DELETE", "/nodes", json={"url": first.url})
    await first.stop()
    await until(lambda: len(decode.submits) == 2, "asked again")
    decode.accept.set()
    assert (await stream.wait()).tokens == expected(PROMPT, 40)


async def test_nodes_learn_how_old_a_request_is(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node)
    running = await start_router(*nodes)
    stream = Stream(running, 100)
    await until(lambda: len(stream.tokens) > 20, "tokens")
    await next(node for node in nodes[2:] if node.running).stop()
    assert (await stream.wait()).tokens == expected(PROMPT, 100)
    ages = sorted((submit.num_output, submit.age_s) for node in nodes for submit in node.submits)
    (_, first_s), (resumed_at, resumed_s) = ages[0], ages[-1]
    assert first_s < 5 and resumed_s - first_s > 0.1 and resumed_at > 20  # tokens take 5 ms
    assert all([s.number for s in node.submits] == list(range(1, 1 + len(node.submits))) for node in nodes)


async def test_streams_that_wait_for_room_go_on_oldest_first(start_node: StartNode, start_router: StartRouter) -> None:
    first = await start_node("decode", token_s=0.01)
    running = await start_router(first)
    streams = []
    for _ in range(4):
        streams.append(Stream(running, 500))  # none ends on the first node, however long the others take
        await until(lambda: len(streams[-1].tokens) > 2, "tokens")
    second = await start_node("decode")
    second.batch = 50
    second.refuse = link.Failure("refused", "it goes to sleep", retry_after_s=0.2)
    await running.http.post("/nodes", json={"url": second.url})
    await until(lambda: len(running.router.registry.nodes()) == 2, "linked")
    await first.stop()
    await until(lambda: len(second.submits) > 6 and not second.running, "all have asked, some again, and were refused")
    second.refuse = None
    before = len(second.submits)
    tokens = expected(PROMPT, 500)
    for stream in streams:
        assert (await stream.wait()).tokens == tokens
    # strictly by age, each as soon as the one before it was accepted
    came, went_on = first.submits, second.submits[before:]
    assert len(came) == 4 and [_request(submit) for submit in went_on] == [_request(submit) for submit in came]


def _request(submit: link.Submit) -> str:
    return submit.id.split("~")[0]


# --- who cannot work ------------------------------------------------------------------------------------


async def test_a_misfit_gets_no_requests_and_says_why(
    start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = await four(start_node, token_s=0.001)
    misfit = nodes[0]
    for node in nodes[2:]:
        node.misfits = {misfit.id: "it has another secret"}
    running = await start_router(*nodes, ready=False, min_prefill=1)
    await until(lambda: len(running.router.registry.nodes()) == 4, "linked")
    await until(lambda: all(n.misfits for n in running.router.registry.nodes() if n.role == "decode"), "statuses")
    await asyncio.gather(*(running.complete([5, 6, 7 + n]) for n in range(24)))
    assert not misfit.submits and len(nodes[1].submits) == 24
    await until(lambda: "gets no requests" in caplog.text, "a warning")
    status = (await running.http.get("/v1/status")).json()
    (found,) = [node for node in status["nodes"] if node["id"] == misfit.id]
    assert (found["state"], found["reason"]) == ("misfit", "it has another secret")
    metrics = (await running.http.get("/metrics")).text
    assert 'pd_serve_nodes{role="prefill",state="misfit"} 1.0' in metrics
    assert f'pd_serve_unfit_pair{{decode="{nodes[2].id}",prefill="{misfit.id}"}} 1.0' in metrics
    for node in nodes[2:]:
        node.misfits = {}
    await until(lambda: not any(n.misfits for n in running.router.registry.nodes()), "mended")
    await asyncio.gather(*(running.complete([5, 6, 7 + n]) for n in range(8)))
    assert misfit.submits
    assert caplog.text.count("gets no requests") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["internal", "transfer"])
async def test_a_node_that_only_fails_gets_trials_only(
    start_node: StartNode, start_router: StartRouter, kind: str
) -> None:
    nodes = await four(start_node, token_s=0.001)
    bad = nodes[2]
    bad.fail = [link.Failure(kind, "as ever")] * 100
    running = await start_router(*nodes)
    for number in range(24):
        await running.complete([5, 6, 7 + number])
    # three failures of the node, or of each of its two pairs, and perhaps a trial
    assert 3 <= len(bad.submits) <= 3 * (2 if kind == "transfer" else 1) + 2
    state = {n["id"]: n["state"] for n in (await running.http.get("/v1/status")).json()["nodes"]}
    assert state[bad.id] == ("misfit" if kind == "transfer" else "failing")
    assert state[nodes[3].id] == "ready"
    assert "pd_serve_trips_total" in (await running.http.get("/metrics")).text
    bad.fail = []
    await until(lambda: _tried(running, bad), "a trial that went well", 8.0)


async def _tried(running: Running, node: ScriptedNode) -> bool:
    await running.complete()
    registry = running.router.registry
    return node.id not in next(iter(registry.groups.values())).troubles()


async def test_where_all_fail_the_best_is_tried(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode, max_attempts=1)
    decode.fail = [link.Failure("internal", "out of luck")] * 4
    assert {(await running.post(prompt=PROMPT)).status_code for _ in range(4)} == {502}
    await running.complete()


async def test_nonsense_of_a_node_is_a_fault_of_that_node(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = await four(start_node, token_s=0.005)
    running = await start_router(*nodes)
    for index, tokens in ((-3, [50]), (10**9, [50]), (4, [-5]), (4, [10**6]), (0, [50] * 500)):
        stream = Stream(running)
        await until(lambda stream=stream: len(stream.tokens) > 1, "tokens")
        node = next(node for node in nodes[2:] if node.running)
        (id,) = node.running
        for connection in list(node._connections):
            await node._send(connection, link.Outputs([link.Output(id, index, tokens)]))
        assert (await stream.wait()).tokens == expected(PROMPT, 40)
        await until(lambda node=node, id=id: id not in node.running, "its part is ended, by an abort or with the link")
        await until(lambda: len(running.router.registry.nodes()) == 4, "linked again, where that ended the link")


# --- nodes that come, leave and change ------------------------------------------------------------------


async def test_24_nodes_that_leave_at_once_leave_no_request_hanging(
    start_node: StartNode, start_router: StartRouter
) -> None:
    nodes = [await start_node(role, token_s=0.02) for role in ("prefill", "decode") for _ in range(12)]
    running = await start_router(node_wait_s=0.3, ready=False)
    for node in nodes:
        await running.http.post("/nodes", json={"url": node.url})
    await until(lambda: len(running.router.registry.nodes()) == 24, "linked")
    async with httpx.AsyncClient(base_url=running.url, timeout=20, trust_env=False) as client:
        bodies = [{"prompt": [5, 6, 7 + n], "max_tokens": 400, "stream": bool(n % 2)} for n in range(40)]
        requests = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        await until(lambda: len(running.router.shared.active) == 40, "40 open")
        await asyncio.sleep(0.1)
        leaving = [asyncio.create_task(client.request("DELETE", "/nodes", json={"url": n.url})) for n in nodes]
        answers = await asyncio.wait_for(asyncio.gather(*requests), 10)
        await asyncio.gather(*leaving)
    for answer in answers:
        assert answer.status_code == 503 or "no_nodes" in answer.text or "nodes_failed" in answer.text, answer.text
    assert not running.router.registry.nodes() and not running.router.shared.active
    for node in (nodes[0], nodes[-1]):
        await running.http.post("/nodes", json={"url": node.url})
    await until(lambda: len(running.router.registry.nodes()) == 2, "linked again")
    await running.complete()


async def test_after_a_start_requests_wait_for_nodes(start_node: StartNode, start_router: StartRouter) -> None:
    decode = await start_node("decode")
    running = await start_router(ready=False, node_wait_s=3.0)
    waiting = [asyncio.create_task(running.complete(model=model)) for model in ("tiny", "")]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in waiting)
    await running.http.post("/nodes", json={"url": decode.url})
    await asyncio.wait_for(asyncio.gather(*waiting), 2)
    running.router.requests._begun_s -= 3.0  # it is no longer new
    began_s = asyncio.get_running_loop().time()
    assert (await running.post(prompt="x", model="other")).status_code == 404
    assert asyncio.get_running_loop().time() - began_s < 0.5


async def test_a_restarted_node_changes_what_is_used_and_announced(
    start_node: StartNode, start_router: StartRouter
) -> None:
    def info(text: str, limit: int) -> link.ModelInfo:
        return link.ModelInfo("tiny", "f1", limit, tiny.info().vocab_size, [tiny.EOS], text)

    old = await start_node("decode", info=info("a", 20))
    running = await start_router(old)
    long = {"prompt": list(range(5, 35)), "max_tokens": 4}
    assert (await running.post(**long)).json()["error"]["code"] == "context_length_exceeded"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    await old.stop()
    await until(lambda: not running.router.registry.nodes(), "lost")
    assert (await running.http.get("/v1/models")).json()["data"] == []
    bundle = tiny.bundle(chat=False)
    new = await start_node("decode", port=old.port, node_id=old.id, info=info("b", 64), bundle=bundle)
    await running.ready()
    assert (await running.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 64
    await running.complete(**long)
    assert "template" in (await running.post("/v1/chat/completions", **chat)).text
    assert len(new.submits) == 1


async def test_nodes_that_differ_get_what_fits_them(start_node: StartNode, start_router: StartRouter) -> None:
    small = await start_node("decode", info=tiny.info(max_model_len=20))
    large = await start_node("decode", info=tiny.info(max_model_len=100))
    running = await start_router(small, large)
    assert (await running.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 100
    await asyncio.gather(*(running.complete(list(range(5, 35)), 8) for _ in range(4)))
    assert len(large.submits) == 4 and not small.submits
    refused = await running.post(prompt=list(range(5, 35)), max_tokens=80)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


async def test_a_refused_link_is_tried_again_with_a_pause_and_shown(
    start_node: StartNode, start_router: StartRouter
) -> None:
    decode = await start_node("decode")
    decode.link_version = 99
    running = await start_router(ready=False)
    await running.http.post("/nodes", json={"url": decode.url})

    async def shown() -> bool:
        nodes = (await running.http.get("/v1/status")).json()["nodes"]
        return bool(nodes) and nodes[0]["state"] == "refused" and "version 99" in nodes[0]["reason"]

    await until(shown, "the reason")
    decode.link_version = link.LINK_VERSION
    await running.ready()
