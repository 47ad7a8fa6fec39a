"""Requests that nothing goes wrong with: the join of two nodes' tokens, shapes, choices, placement."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pd_serve.api.chat_template import ChatTemplates
from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire.link import Failure
from tests.api import tiny
from tests.api.families import ANY_ROLE
from tests.router.conftest import Running, StartNode, StartRouter, idle, until
from tests.router.scripted_node import expected

TOKENIZER = TextTokenizer(tiny.byte_level())
PROMPT = TOKENIZER.encode("the fox", add_special_tokens=True)


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


async def events(running: Running, path: str = "/v1/completions", **body: object) -> list[Any]:
    found = []
    async with running.http.stream("POST", path, json={"model": "tiny", "temperature": 0, "stream": True, **body}) as r:
        assert r.status_code == 200, await r.aread()
        assert r.headers["content-type"].startswith("text/event-stream")
        async for line in r.aiter_lines():
            if line.startswith("data: "):
                found.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
    return found


@pytest.fixture
async def pair(start_node: StartNode, start_router: StartRouter) -> Running:
    return await start_router(await start_node("prefill"), await start_node("decode"))


async def test_the_first_token_comes_from_prefill_the_rest_from_decode(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    answer = await running.complete(return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["token_ids"] == expected(PROMPT, 8)
    assert choice["text"] == text(expected(PROMPT, 8))
    assert choice["prompt_token_ids"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 8,
        "total_tokens": len(PROMPT) + 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    (to_prefill,), (to_decode,) = prefill.submits, decode.submits
    assert to_prefill.id == to_decode.id
    assert to_prefill.handoff and to_prefill.source is None
    assert to_decode.source is not None and to_decode.source.node_id == prefill.id
    assert decode.peers[-1].sources == [to_decode.source]


async def test_the_first_token_does_not_wait_for_decode(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    decode.hold.clear()
    running = await start_router(prefill, decode)
    async with running.http.stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "the fox", "stream": True, "max_tokens": 4}
    ) as answer:
        lines = answer.aiter_lines()
        first = json.loads((await anext(lines))[6:])
        assert first["choices"][0]["finish_reason"] is None
        decode.hold.set()
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"


async def test_one_event_a_token_and_the_same_text(pair: Running) -> None:
    whole = await pair.complete("the fox", 12)
    found = await events(pair, prompt="the fox", max_tokens=12, stream_options={"include_usage": True})
    assert found[-1] == "data: [DONE]" or found[-1] == "[DONE]"
    *tokens, usage = found[:-1]
    assert len(tokens) == 12
    assert "".join(e["choices"][0]["text"] for e in tokens) == whole["choices"][0]["text"]
    assert [e["choices"][0]["finish_reason"] for e in tokens] == [None] * 11 + ["length"]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert len({e["id"] for e in found[:-1]}) == 1


async def test_chat_stream_and_whole(pair: Running) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]}]
    answer = await pair.post("/v1/chat/completions", messages=messages, max_completion_tokens=6, return_token_ids=True)
    document = answer.json()
    prompt = TOKENIZER.encode("<|start|>user: the\nfox<|end|>\n<|start|>assistant:", add_special_tokens=False)
    assert document["prompt_token_ids"] == prompt
    message = document["choices"][0]["message"]
    assert message == {"role": "assistant", "content": text(expected(prompt, 6))}
    found = await events(pair, "/v1/chat/completions", messages=messages, max_tokens=6, n=2)
    deltas = [(c["index"], c["delta"]) for e in found[:-1] for c in e["choices"]]
    for index in (0, 1):
        mine = [delta for i, delta in deltas if i == index]
        assert mine[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in mine) == message["content"]


async def test_eos_is_no_text_and_ends_both_nodes(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    decode.eos_at = prefill.eos_at = 3
    answer = await running.complete(return_token_ids=True)
    assert answer["choices"][0]["text"] == text(expected(PROMPT, 3))
    assert answer["choices"][0]["token_ids"] == [*expected(PROMPT, 3), tiny.EOS]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    prefill.eos_at = decode.eos_at = 0
    answer = await running.complete()
    assert answer["choices"][0]["text"] == ""
    await until(idle(prefill, decode), "idle")
    whole = await running.complete(skip_special_tokens=False, include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == tiny.SPECIALS[tiny.EOS]


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_stop_string_ends_the_sequence_on_the_nodes(
    start_node: StartNode, start_router: StartRouter, batch: int
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", token_s=0.005)
    decode.batch = batch
    running = await start_router(prefill, decode)
    ids = expected(PROMPT, 60)
    output = text(ids)
    stop = text(ids[9:12])  # across three tokens
    assert output.index(stop) > 0
    for include in (False, True):
        body = {
            "prompt": "the fox",
            "max_tokens": 400,
            "stop": [stop, "nowhere"],
            "include_stop_str_in_output": include,
        }
        answer = await running.complete(**body)  # type: ignore[arg-type]
        end = output.index(stop) + (len(stop) if include else 0)
        assert answer["choices"][0]["text"] == output[:end]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["stop_reason"] == stop
        assert answer["usage"]["completion_tokens"] <= 12
        found = await events(running, **body)
        assert "".join(c["text"] for e in found[:-1] for c in e["choices"]) == output[:end]
        await until(idle(prefill, decode), "idle")
        assert decode.aborted


async def test_choices_have_their_own_seeds(pair: Running) -> None:
    answer = await pair.complete([PROMPT, PROMPT[:2]], 6, n=2, seed=-5, temperature=1, return_token_ids=True)
    found = [choice["token_ids"] for choice in answer["choices"]]
    seeds = [(-5 + i) % 2**64 for i in range(2)]
    assert found == [expected(prompt, 6, seed) for prompt in (PROMPT, PROMPT[:2]) for seed in seeds]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(PROMPT) + 2


async def test_more_sequences_than_nodes_take_at_once(pair: Running) -> None:
    answer = await pair.complete([[i] for i in range(1, 200)], 2, return_token_ids=True)
    assert [c["token_ids"] for c in answer["choices"]] == [expected([i], 2) for i in range(1, 200)]


async def test_echo_and_logprobs(pair: Running) -> None:
    answer = await pair.complete("the fox", 3, echo=True, logprobs=2)
    choice = answer["choices"][0]
    output = expected(PROMPT, 3)
    assert choice["text"] == "the fox" + text(output)
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == choice["text"]
    assert scores["token_logprobs"] == [None] + [-2.0] * (len(PROMPT) - 1) + [-0.5] * 3
    assert scores["text_offset"] == [len("".join(scores["tokens"][:i])) for i in range(len(scores["tokens"]))]
    assert scores["top_logprobs"][0] is None and len(scores["top_logprobs"][-1]) == 2
    scored = await pair.complete("the fox", 0, echo=True, logprobs=0)
    assert scored["choices"][0]["text"] == "the fox"
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == len(PROMPT)
    assert scored["usage"]["completion_tokens"] == 0
    parts = (await events(pair, prompt=PROMPT, max_tokens=3, echo=True, logprobs=2))[:-1]
    assert "".join(e["choices"][0]["text"] for e in parts) == choice["text"]
    assert [t for e in parts for t in e["choices"][0]["logprobs"]["tokens"]] == scores["tokens"]


async def test_text_offsets_count_characters_of_the_text(pair: Running) -> None:
    """Whatever tokens are called: halves of characters, tokens that are no text."""
    prompt = "<|end|>é🦊 " + tiny.EMOJI
    for body in ({"prompt": prompt}, {"prompt": TOKENIZER.encode(prompt, add_special_tokens=False)}):
        (choice,) = (await pair.complete(**body, max_tokens=3, echo=True, logprobs=0))["choices"]
        scores, shown = choice["logprobs"], choice["text"]
        offsets = scores["text_offset"]
        assert offsets == sorted(offsets) and offsets[0] == 0
        for token, offset in zip(scores["tokens"], offsets, strict=True):
            if not token.startswith("bytes:") and token not in tiny.SPECIALS:
                assert shown.startswith(token, offset)
        assert offsets[-3:] == [len(shown) - len("".join(scores["tokens"][-n:])) for n in (3, 2, 1)]
    assert choice["text"].startswith("é") and offsets[1] == 0  # skipped specials take no place


async def test_prompt_logprobs_in_vllms_shape(pair: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "n": 2, "prompt_logprobs": 0}
    for choice in (await pair.complete(**body))["choices"]:  # type: ignore[arg-type]
        first, *rest = choice["prompt_logprobs"]
        assert first is None and choice["logprobs"] is None
        assert rest == [
            {str(id): {"logprob": -2.0, "rank": 3, "decoded_token": TOKENIZER.token_text(id)}} for id in PROMPT[1:]
        ]
    messages = [{"role": "user", "content": "x"}]
    answer = (await pair.post("/v1/chat/completions", messages=messages, max_tokens=1, prompt_logprobs=1)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_usage_in_every_event(pair: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        *found, last = (await events(pair, path, **body, max_tokens=4, stream_options=options))[:-1]
        counts = [event["usage"]["completion_tokens"] for event in found if event["choices"]]
        assert counts == [1, 2, 3, 4] if path == "/v1/completions" else [1, 1, 2, 3, 4]
        assert len({event["usage"]["prompt_tokens"] for event in found}) == 1
        assert last["choices"] == [] and last["usage"] == found[-1]["usage"]


async def test_comments_keep_a_stream_that_waits(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode, sse_keep_alive_s=0.05)
    prefill.hold.clear()
    body = {"model": "tiny", "prompt": "the fox", "stream": True, "max_tokens": 4}
    async with running.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = (line async for line in answer.aiter_lines() if line)
        assert [await anext(lines) for _ in range(2)] == [": keep-alive"] * 2  # before the first token
        decode.hold_after = 2
        prefill.hold.set()
        assert (await anext(lines)).startswith("data: ")
        rest = [line async for line in until_comment(lines)]  # in the middle
        decode.hold.set()
        rest += [line async for line in lines if line.startswith("data: ")]
    assert len(rest) == 4 and rest[-1] == "data: [DONE]"

    # An error after the comment is an event.
    prefill.fail = [Failure("invalid", "not this one")]
    prefill.hold.set()
    assert (await running.post(**{**body, "stream": True})).status_code == 400  # at once: a status
    prefill.hold.clear()
    async with running.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line async for line in answer.aiter_lines() if line)
        assert await anext(lines) == ": keep-alive"
        running.router.end_all()
        found = [line async for line in lines if line.startswith("data: ")]
    assert len(found) == 1 and json.loads(found[0][6:])["error"]["code"] == "shutting_down"
    assert (await running.http.get("/health")).status_code == 200


async def until_comment(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        if line.startswith(":"):
            return
        yield line


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_stream_backlog": 64 << 10}, "bytes of its stream unread"),
        # Another error waits for it, and is not read either.
        ({"request_timeout_s": 1.5, "sse_keep_alive_s": 0.1}, "read nothing"),
    ],
)
async def test_a_client_that_does_not_read_is_cut_off(
    start_node: StartNode,
    start_router: StartRouter,
    caplog: pytest.LogCaptureFixture,
    limits: dict[str, float],
    why: str,
) -> None:
    node = await start_node("decode", info=tiny.info(max_model_len=100_000), token_s=0)
    running = await start_router(node, **limits)
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 90_000, "n": 20, "logprobs": 2}
    encoded = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(encoded)}\r\n\r\n"
    writer.write(head.encode() + encoded)
    try:
        if "request_timeout_s" in limits:
            await until(lambda: running.router.shared.active, "started")
            (stream, *_) = running.router.shared.active
            await until(lambda: stream._sink._answer._backlog_bytes > 10_000, "blocked")  # type: ignore[attr-defined]
            running.router.end_all()
        await until(lambda: any(why in record.getMessage() for record in caplog.records), "cut off")
        await until(idle(node), "idle")
        await until(lambda: running.router.metrics.models["tiny"].in_flight == 0, "ended")
        assert not running.router.shared.active
        await until(lambda: not running.connections, "closed before the client has read anything")
        assert not (await asyncio.wait_for(reader.read(), 5)).endswith(b"[DONE]\n\n")
        assert not any(record.name.startswith("uvicorn") for record in caplog.records)
    finally:
        writer.close()


async def test_a_template_without_tools_is_said(pair: Running, caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "x"}]
    text_model = pair.router.registry.find("tiny").text  # type: ignore[union-attr]
    shown = await pair.post("/v1/chat/completions", messages=messages, tools=tools, max_tokens=1)
    assert "x-warning" not in shown.headers
    text_model.templates = ChatTemplates({"default": ANY_ROLE}, {})
    for stream in (False, True):
        answer = await pair.post("/v1/chat/completions", messages=messages, tools=tools, max_tokens=1, stream=stream)
        assert (
            answer.headers["x-warning"]
            == "the chat template of tiny knows no 'tools': a system message tells the model of them"
        )
    assert len([r for r in caplog.records if "'tools'" in r.getMessage()]) == 1


async def test_short_prompts_and_single_tokens_take_one_node(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", local_prefill_tokens=3)
    running = await start_router(prefill, decode)
    assert (await running.complete([5, 6], 4, return_token_ids=True))["choices"][0]["token_ids"] == expected([5, 6], 4)
    assert not prefill.submits and decode.submits[-1].source is None
    await running.complete(PROMPT * 4, 1)
    assert len(decode.submits) == 1 and not prefill.submits[-1].handoff


async def test_decode_nodes_serve_alone(start_node: StartNode, start_router: StartRouter) -> None:
    decode = await start_node("decode")
    running = await start_router(decode)
    assert (await running.complete(return_token_ids=True))["choices"][0]["token_ids"] == expected(PROMPT, 8)


async def test_only_equal_layouts_are_paired(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = [await start_node(role, layout=layout) for layout in ("x", "y") for role in ("prefill", "decode")]
    running = await start_router(*nodes)
    await asyncio.gather(*(running.complete([i, i, i]) for i in range(1, 21)))
    by_id = {node.id: node for node in nodes}
    for node in nodes[1::2]:
        assert len(node.submits) >= 5
        assert all(by_id[s.source.node_id].layout == node.layout for s in node.submits if s.source)
        assert all(by_id[s.node_id].layout == node.layout for s in node.peers[-1].sources)


async def test_load_is_spread(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = [await start_node(role, token_s=0.01) for role in ("prefill", "prefill", "decode", "decode")]
    running = await start_router(*nodes)
    await asyncio.gather(*(running.complete([i, i, i]) for i in range(1, 21)))
    for node in nodes:
        assert 7 <= len(node.submits) <= 13


async def test_several_models(start_node: StartNode, start_router: StartRouter) -> None:
    first = await start_node("decode")
    other = await start_node("decode", info=tiny.info("other"), bundle=tiny.bundle("other", chat=False))
    running = await start_router(first, other, ready=False)
    await until(lambda: len(running.router.registry.nodes()) == 2, "both")
    names = [m["id"] for m in (await running.http.get("/v1/models")).json()["data"]]
    assert sorted(names) == ["other", "tiny"]
    await running.complete(model="other")
    assert len(other.submits) == 1 and not first.submits
    assert (await running.post(prompt="x", model="")).status_code == 400
    refused = await running.post("/v1/chat/completions", model="other", messages=[{"role": "user", "content": "x"}])
    assert refused.status_code == 400 and "/v1/completions" in refused.json()["error"]["message"]
    assert (await running.http.get("/v1/models/other")).json()["id"] == "other"
    assert (await running.http.get("/v1/models/third")).status_code == 404


async def test_tokenize_and_back(pair: Running) -> None:
    answer = (
        await pair.http.post("/tokenize", json={"prompt": "the fox " + tiny.EMOJI, "return_token_strs": True})
    ).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    back = await pair.http.post("/detokenize", json={"model": "tiny", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "the fox " + tiny.EMOJI}
    chat = await pair.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.json()["tokens"] == TOKENIZER.encode(
        "<|start|>user: hi<|end|>\n<|start|>assistant:", add_special_tokens=False
    )


async def test_the_official_clients(pair: Running) -> None:
    import openai  # takes seconds, and each worker imports this file

    messages: Any = [{"role": "user", "content": "the fox"}]
    client = openai.AsyncOpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0)
    whole = await client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=1,
        user="me",
        store=False,
    )
    content = whole.choices[0].message.content
    assert content and whole.choices[0].logprobs is not None
    parts = []
    async for chunk in await client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        parts += [choice.delta.content or "" for choice in chunk.choices]
        if not chunk.choices:
            assert chunk.usage == whole.usage
    assert "".join(parts) == content

    def sync() -> str:
        with openai.OpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0) as other:
            stream = other.completions.create(model="tiny", prompt="the fox", max_tokens=8, temperature=0, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(sync) == text(expected(PROMPT, 8))
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nothing", prompt="x")
    await client.close()


async def test_status_metrics_and_probes(pair: Running) -> None:
    await pair.complete(n=2)
    status = (await pair.http.get("/v1/status")).json()
    assert [n["state"] for n in status["nodes"]] == ["ready", "ready"]
    assert [n["role"] for n in status["nodes"]] == ["decode", "prefill"]
    assert status["nodes"][0]["transport"] == "test" and status["models"][0]["name"] == "tiny"
    assert status["in_flight"] == {"tiny": 0} and status["sequences"] == 0
    await until(lambda: all(node.counters for node in pair.router.registry.nodes()), "counters")
    metrics = (await pair.http.get("/metrics")).text
    assert 'pd_serve_time_to_first_token_seconds_count{model="tiny"} 1.0' in metrics
    assert 'pd_serve_inter_token_latency_seconds_count{model="tiny"} 14.0' in metrics
    assert 'pd_serve_requests_total{endpoint="/v1/completions",status="200"} 1.0' in metrics
    assert 'pd_serve_nodes{role="decode",state="ready"} 1.0' in metrics
    assert 'transport="test"' in metrics
    assert 'pd_serve_queue_time_seconds_count{model="tiny"} 1.0' in metrics
    assert "vllm:" not in metrics and "\npd_serve_node_" not in metrics  # what nodes say of themselves
    assert (await pair.http.get("/health")).status_code == 200


async def test_vllm_metric_names(start_node: StartNode, start_router: StartRouter) -> None:
    running = await start_router(await start_node("prefill"), await start_node("decode"), vllm_metric_names=True)
    await running.complete(n=2)
    names = [f"vllm:{name}" for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
    families = {f.name: f for f in text_string_to_metric_families((await running.http.get("/metrics")).text)}
    for name in names:
        assert families[name].type == "gauge"
        assert [sample.labels for sample in families[name].samples] == [{"model_name": "tiny", "engine": "0"}]
    counted = {s.name: s.value for f in families.values() if f.type == "counter" for s in f.samples}
    assert counted["vllm:request_success_total"] == 2
    assert set(families["vllm:request_success"].samples[0].labels) == {"model_name", "engine", "finished_reason"}
    for name in ("prompt_tokens_total", "generation_tokens_total"):
        assert counted[f"vllm:{name}"] == counted[f"pd_serve_{name}"] > 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert families[f"vllm:{name}"].type == "histogram"
        counts = [s.value for s in families[f"vllm:{name}"].samples if s.name.endswith("_count")]
        assert counts == [1.0]


async def test_request_ids(pair: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pd_serve.access")
    given = await pair.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}, headers={"X-Request-Id": "abc-1"}
    )
    assert given.headers["x-request-id"] == "abc-1" and given.json()["id"].startswith("cmpl-abc-1-")
    again = await pair.http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "abc-1"})
    assert again.json()["id"] != given.json()["id"]
    assert any(r.getMessage().startswith("abc-1 /v1/completions 200 model=tiny") for r in caplog.records)
    bad = await pair.http.post("/v1/completions", json={"prompt": ""}, headers={"X-Request-Id": "abc-2"})
    assert bad.json()["error"]["request_id"] == "abc-2"
    odd = await pair.http.get("/health", headers={"X-Request-Id": "a b\tc"})
    assert odd.headers["x-request-id"] not in ("", "a b\tc")


async def test_api_keys(start_node: StartNode, start_router: StartRouter) -> None:
    running = await start_router(await start_node("decode"), api_key=("sk-1", "sk-2"))
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for header, status in (("", 401), ("Bearer sk-3", 401), ("sk-1", 401), ("Bearer sk-1", 200), ("bearer sk-2", 200)):
        headers = {"Authorization": header} if header else {}
        answer = await running.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status
    for name in ("x-api-key", "api-key"):
        for key, status in (("sk-1", 200), ("sk-3", 401)):
            answer = await running.http.post("/v1/completions", json=body, headers={name: key})
            assert answer.status_code == status
    assert (await running.http.get("/v1/status")).status_code == 401
    error = (await running.http.post("/tokenize", json={"prompt": "x"})).json()["error"]
    assert error["type"] == "authentication_error" and error["request_id"]
    assert (await running.http.get("/metrics")).status_code == 401
    for path in ("/health", "/ready"):
        assert (await running.http.get(path)).status_code == 200


async def test_pages_of_other_origins(start_node: StartNode, start_router: StartRouter) -> None:
    page = "http://localhost:3000"
    running = await start_router(await start_node("decode"), api_key=("sk-1",), cors_origin=(page,))
    asking = {"Origin": page, "Access-Control-Request-Method": "POST"}
    asking["Access-Control-Request-Headers"] = "authorization,content-type"
    asked = await running.http.options("/v1/chat/completions", headers=asking)
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == page
    assert "authorization" in asked.headers["access-control-allow-headers"]
    refused = await running.http.options("/v1/chat/completions", headers={**asking, "Origin": "http://evil.example"})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    body = {"prompt": "x", "max_tokens": 1}
    for key, status in (("sk-1", 200), ("sk-2", 401)):  # the page can read errors, too
        headers = {"Origin": page, "Authorization": f"Bearer {key}"}
        answer = await running.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == page
    plain = await start_router(await start_node("decode"))
    answer = await plain.http.options("/v1/chat/completions", headers=asking)
    assert answer.headers["allow"] == "OPTIONS, POST" and "access-control-allow-origin" not in answer.headers


async def test_fields_that_nobody_knows(start_node: StartNode, start_router: StartRouter) -> None:
    node = await start_node("decode")
    body = {"prompt": "x", "max_tokens": 1, "provider": {"order": ["x"]}, "no_such_field": 1, "model": None}
    for strict, status in ((False, 200), (True, 400)):
        running = await start_router(node, strict_fields=strict)
        assert (await running.http.post("/v1/completions", json=body)).status_code == status


async def test_models_with_a_slash_and_the_tokenizer(pair: Running) -> None:
    assert (await pair.http.get("/v1/models/")).json() == (await pair.http.get("/v1/models")).json()
    found = (await pair.http.get("/tokenizer_info")).json()
    assert found["eos_token"] == tiny.SPECIALS[tiny.EOS] and found["chat_template"] == tiny.CHAT_TEMPLATE
    assert (await pair.http.get("/tokenizer_info?model=x")).status_code == 404


async def test_a_slow_reader_gets_everything(pair: Running) -> None:
    async with pair.http.stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True}
    ) as answer:
        await asyncio.sleep(0.5)
        lines = [line async for line in answer.aiter_lines() if line]
    assert len(lines) == 301 and lines[-1] == "data: [DONE]"
