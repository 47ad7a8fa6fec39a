"""vLLM's servers behind the router: what they are asked, what clients get, and what becomes of KV that nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pd_serve.router.backends import vllm, vllm_words
from pd_serve.router.backends.served import samples_of
from tests.router import scripted_vllm
from tests.router.conftest import Running, StartRouter, until
from tests.router.scripted_node import expected
from tests.router.scripted_server import text_of, with_one_dying, write_model
from tests.router.scripted_vllm import Fabric, ScriptedVLLM, kept
from tests.router.test_traces import TRACE, Traces, ask

Start = Callable[..., Awaitable[ScriptedVLLM]]
PROMPT = list(range(50, 82))  # two blocks, exactly


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    fabric, servers = Fabric(), []

    async def one(port: int = 0, **options: Any) -> ScriptedVLLM:
        servers.append(await ScriptedVLLM(fabric, **options).start(port))
        return servers[-1]

    yield one
    for server in servers:
        await server.stop()


Behind = Callable[..., Awaitable[Running]]


@pytest.fixture
def behind(start_router: StartRouter, tmp_path: Path) -> Behind:
    model = write_model(tmp_path)

    async def router(prefill: list[ScriptedVLLM], decode: list[ScriptedVLLM], **options: Any) -> Running:
        urls = {"prefill_url": tuple(p.url for p in prefill), "decode_url": tuple(d.url for d in decode)}
        counts = {"min_prefill": len(prefill), "min_decode": len(decode)}
        return await start_router(**{**urls, **counts, "tokenizer": (model,), **options})

    return router


WANTED = text_of(expected(PROMPT, 12))


@pytest.mark.parametrize("generate", ["stream", "whole", ""])
async def test_prefill_then_decode(start: Start, behind: Behind, generate: str) -> None:
    p, d = await start(generate=generate), await start(generate=generate)
    running = await behind([p], [d])
    theirs = {"do_remote_prefill": True, "remote_block_ids": [[1]], "remote_engine_id": "kills"}
    answer = await running.complete(PROMPT, 12, kv_transfer_params=theirs, seed=7)
    assert answer["choices"][0]["text"] == WANTED and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(PROMPT) and answer["usage"]["completion_tokens"] == 12
    (asked,), (read,) = p.asked, d.asked
    assert asked["kv_transfer_params"] == {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }  # fmt: skip
    assert asked.get("sampling_params", asked)["max_tokens"] == 1 and not asked["stream"]
    assert read.get("token_ids", read.get("prompt")) == PROMPT, "the first token is not the prompt's"
    assert read.get("sampling_params", read)["max_tokens"] == 12
    assert read["kv_transfer_params"]["of_a_later_version"] == {"b": [1.5, None], "a": "é"}
    assert read["kv_transfer_params"]["remote_engine_id"] == p.engine_id
    ids = [headers["x-request-id"] for server in (p, d) for _, _, headers in server.bodies[-1:]]
    assert ids[0] == ids[1]
    assert not p.kept and not d.dead
    assert [path for path, _, _ in d.bodies][-1] == (
        "/inference/v1/generate" if generate == "stream" else "/v1/completions"
    )
    assert not running.router.links._backends["vllm"].handovers  # type: ignore[attr-defined]


async def test_versions_that_read_params_among_the_sampling_params_alone(start: Start, behind: Behind) -> None:
    p, d = await start(version="0.24.0", ours=True), await start(version="0.24.0", ours=True)
    running = await behind([p], [d])
    assert (await running.complete(PROMPT, 12))["choices"][0]["text"] == WANTED
    assert d.asked[0]["token_ids"] == [*PROMPT, *expected(PROMPT, 1)], "it was handed over"
    assert not p.kept


async def test_a_prefill_server_that_keeps_nothing_is_told_of(
    start: Start, behind: Behind, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = await start(), await start()
    running = await behind([p], [d])
    monkeypatch.setattr(scripted_vllm._Run, "keep", lambda _: None)
    for _ in range(4):
        assert (await running.complete(PROMPT, 12))["choices"][0]["text"] == WANTED
    assert caplog.text.count("keeps no KV for decode servers") == 1 and p.url in caplog.text


async def test_streams_lists_and_choices(start: Start, behind: Behind) -> None:
    p, d = await start(), await start()
    running = await behind([p], [d])
    answer = await running.complete([PROMPT, PROMPT[:20]], 6, n=2)
    texts = [text_of(expected(prompt, 6)) for prompt in (PROMPT, PROMPT, PROMPT[:20], PROMPT[:20])]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert len(p.asked) == 4 and not p.kept, "each is a request of its own"
    chat = {
        "messages": [{"role": "user", "content": "the fox"}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    streamed = await running.post("/v1/chat/completions", **chat)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert sum(len(event["choices"]) and bool(event["choices"][0]["delta"].get("content")) for event in events) == 5
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 4, "as the prefill server said"


async def test_ends_stops_and_logprobs(start: Start, behind: Behind) -> None:
    for generate in ("stream", ""):
        p, d = await start(generate=generate), await start(generate=generate)
        running = await behind([p], [d])
        d.eos_at = p.eos_at = len(PROMPT) + 3
        answer = await running.complete(PROMPT, 12)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == text_of(expected(PROMPT, 3))
        d.eos_at = p.eos_at = None
        stopped = await running.complete(PROMPT, 12, stop=[text_of(expected(PROMPT, 5)[4:5])])
        assert stopped["choices"][0]["text"] == text_of(expected(PROMPT, 4))
        made = expected(PROMPT, 3)
        scored = await running.complete(PROMPT, 3, logprobs=2, return_tokens_as_token_ids=True, echo=True)
        logprobs = scored["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][-3:] == [-0.5] * 3
        assert logprobs["top_logprobs"][-1] == {f"token_id:{made[2]}": -0.5, f"token_id:{made[2] + 1}": -1.5}
        assert logprobs["token_logprobs"][: len(PROMPT)] == [None, *[-2.0] * (len(PROMPT) - 1)]
        await until(lambda p=p, d=d: not p.kept and not d.running, "all is given back")


async def test_grammars_are_theirs_to_follow_and_what_they_cannot_do_is_said(start: Start, behind: Behind) -> None:
    p, d = await start(ours=True), await start(generate="")
    running = await behind([p], [d])
    await running.complete(PROMPT, 4, structured_outputs={"choice": ["a", "b"]})
    assert p.asked[0]["sampling_params"]["structured_outputs"] == {"choice": ["a", "b"]}
    assert d.asked[0]["structured_outputs"] == {"choice": ["a", "b"]}
    assert d.asked[0]["prompt"] == PROMPT, "also with our connector: a grammar begins with the output"
    refused = await running.post(prompt=PROMPT, bad_words=["fox"])
    assert refused.status_code == 400 and "bad_words" in refused.text
    p.refuse = 400
    assert (await running.post(prompt=PROMPT, max_tokens=4)).status_code == 400, "as the server says"


async def test_our_connector_begins_at_the_second_token(start: Start, behind: Behind) -> None:
    p, d = await start(ours=True), await start(ours=True)
    running = await behind([p], [d])
    d.hold.clear()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    async with running.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.aiter_lines()
        first = await asyncio.wait_for(anext(lines), 5)
        assert json.loads(first[6:])["choices"][0]["text"] == text_of(expected(PROMPT, 1)), "D has said nothing yet"
        d.hold.set()
        events = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
    assert "".join([text_of(expected(PROMPT, 1)), *(e["choices"][0]["text"] for e in events)]) == WANTED
    (read,) = d.asked
    assert read["token_ids"] == [*PROMPT, *expected(PROMPT, 1)] and read["sampling_params"]["max_tokens"] == 11
    assert not p.kept
    p.eos_at = len(PROMPT)  # the first token ends it: nobody decodes, and nothing is kept
    assert (await running.complete(PROMPT, 12))["choices"][0]["finish_reason"] == "stop"
    assert len(d.asked) == 1 and not p.kept


async def test_a_stream_goes_on_where_its_servers_die(start: Start, behind: Behind) -> None:
    p1, p2, d1, d2 = [await start() for _ in range(4)]
    running = await behind([p1, p2], [d1, d2])
    survivor, text = await with_one_dying(running, PROMPT, d1, d2)
    assert text == WANTED
    (resumed,) = survivor.asked
    assert resumed["token_ids"] == [*PROMPT, *expected(PROMPT, 5)] and resumed["sampling_params"]["max_tokens"] == 7
    p1.hold.clear()
    p2.hold.clear()
    task = asyncio.create_task(running.complete(PROMPT, 12))
    await until(lambda: p1.running or p2.running, "it is computed")
    dying, other = (p1, p2) if p1.running else (p2, p1)
    other.hold.set()
    dying.kill()
    assert (await task)["choices"][0]["text"] == WANTED
    await until(lambda: len(running.router.registry.nodes()) == 2, "the dead are unlinked")
    assert not other.kept


async def test_what_nobody_reads_is_given_back(start: Start, behind: Behind) -> None:
    p, d1, d2 = [await start() for _ in range(3)]
    running = await behind([p], [d1, d2])
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}

    async def left_when(condition: Callable[[], object]) -> None:
        task = asyncio.create_task(running.http.post("/v1/completions", json=body))
        await until(condition, "it got so far")
        task.cancel()

    # While the prompt is computed: its engine hears of it.
    p.hold.clear()
    await left_when(lambda: p.running)
    await until(lambda: p.aborted == 1 and not p.running, "the prefill server was told")
    p.hold.set()
    # After it was: the decode server has the request, and not its engine yet, which forgets what it was not given.
    d1.take.clear()
    d2.take.clear()
    await left_when(lambda: p.kept)
    await asyncio.sleep(0.1)
    d1.take.set()
    d2.take.set()
    await until(lambda: not p.kept and not d1.running and not d2.running, "read and given up")
    # A decode server refuses: the other one sets free what was kept for it.
    d1.refuse = 503
    assert all(a["choices"][0]["text"] == WANTED for a in [await running.complete(PROMPT, 12) for _ in range(3)])
    await until(lambda: not p.kept, "given back")
    d2.refuse = 503
    assert (await running.post(prompt=PROMPT, max_tokens=12)).status_code == 502


async def test_kv_that_is_gone_is_computed_again(start: Start, behind: Behind) -> None:
    p, d = await start(), await start()
    running = await behind([p], [d])
    d.take.clear()
    task = asyncio.create_task(running.complete(PROMPT, 12))
    await until(lambda: p.kept, "kept")
    p.kept.clear()  # its lease is over
    d.take.set()
    assert (await task)["choices"][0]["text"] == WANTED
    assert len(p.asked) == 2 and not d.dead
    metrics = (await running.http.get("/metrics")).text
    assert 'pd_serve_retries_total{reason="transfer"} 1.0' in metrics


async def test_readiness_load_and_what_operators_see(start: Start, behind: Behind, tmp_path: Path) -> None:
    p, d = await start(key="of the servers"), await start(key="of the servers")
    d.waiting = 3
    listed = tmp_path / "nodes"
    listed.write_text(f"{p.url} vllm prefill  # of another team\n{d.url} vllm decode\n")
    options = {"discover": (f"file://{listed}",), "min_prefill": 1, "min_decode": 1}
    wary = await behind([], [], ready=False, **options)
    reason = await until(lambda: [u.reason for u in wary.router.links.unlinked() if u.state == "refused"], "refused")
    assert "--backend-api-key" in reason[0]
    traces = Traces()
    running = await behind([], [], backend_api_key="of the servers", tracing=traces.tracing, **options)
    await until(lambda: any(node.load.waiting == 3 for node in running.router.registry.nodes()), "its load")
    nodes = {node["url"]: node for node in (await running.http.get("/v1/status")).json()["nodes"]}
    node = nodes[d.url]
    assert (node["role"], node["state"], node["transport"], node["model"]) == ("decode", "ready", "vllm", "tiny")
    assert node["load"]["groups"] == [{"total": 400, "used": 100, "cached": 0, "free": 300}]
    assert (await running.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
    answer = await ask(running, prompt=PROMPT, max_tokens=12)
    assert answer.json()["choices"][0]["text"] == WANTED
    _, (_, attempt) = await traces.tree()
    told = f"00-{TRACE}-{attempt.context.span_id:016x}-01"
    assert [server.bodies[-1][2]["traceparent"] for server in (p, d)] == [told, told]
    assert [event.name for event in attempt.events] == ["accepted", "KV arrived"]
    d.dead = True
    await until(lambda: len(running.router.registry.nodes()) == 1, "its /health says so")
    d.dead = False
    await running.ready()


async def test_servers_of_two_versions_are_no_pair_and_one_alone_does_both(start: Start, behind: Behind) -> None:
    old, new, alone = await start(version="0.24.0"), await start(version="0.32.0"), await start()
    running = await behind([old], [new], ready=False, url=(alone.url,))
    await until(lambda: len(running.router.registry.nodes()) == 3, "linked")
    answers = [await running.complete(PROMPT, 12) for _ in range(4)]
    assert all(answer["choices"][0]["text"] == WANTED for answer in answers)
    assert not old.asked and all("kv_transfer_params" not in body for body in (*new.asked, *alone.asked))
    assert alone.asked


async def test_without_the_models_files_it_says_what_to_give(start: Start, behind: Behind) -> None:
    running = await behind([await start()], [], ready=False, tokenizer=())
    (reason,) = await until(lambda: [u.reason for u in running.router.links.unlinked() if u.state == "refused"], "no")
    assert "--tokenizer" in reason


def test_what_a_real_one_said_is_read_as_it_was_meant() -> None:
    recorded = json.loads((Path(__file__).parent / "exchanges" / "vllm.json").read_text())
    for path in (vllm.GENERATE, vllm.COMPLETIONS):
        answer = vllm_words.answered(json.dumps(recorded[path]["prefill"]).encode())
        params = json.loads(vllm_words.raw_of(answer.kv_transfer_params))
        assert params == recorded[path]["prefill"]["kv_transfer_params"]
        assert params.keys() == kept("", "", 1, 16).keys() - {"of_a_later_version"}, "the scripted server says the same"
        assert answer.choices[0].token_ids == [29] and answer.choices[0].finish_reason == "length"
        events = [vllm_words.answered(json.dumps(event).encode()) for event in recorded[path]["decode"]]
        choices = [choice for event in events for choice in event.choices]
        assert [id for choice in choices for id in choice.token_ids or ()] == [29, 1714, 260, 25]
        assert choices[-1].finish_reason == "length"
        scores = [s for c in choices for s in vllm_words.logprobs_of(c.logprobs, c.token_ids or [], 2)]
        assert [score.rank for score in scores] == [1] * 4 and scores[1].top[1][0] == 1141
    samples = samples_of("\n".join(recorded["metrics"]))
    assert samples["vllm:cache_config_info:num_gpu_blocks"] == 182 and samples["vllm:num_requests_waiting"] == 0
