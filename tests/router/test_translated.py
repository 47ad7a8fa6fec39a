"""The Responses and the Messages API with their own clients, against a router that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.router.conftest import Running, StartNode, StartRouter, idle, until
from tests.router.scripted_node import ScriptedNode

if TYPE_CHECKING:
    import anthropic
    import openai  # each takes seconds to import, and each worker imports all files of tests

HI: Any = [{"role": "user", "content": "the fox"}]
KEY = "sk-test-of-a-client"


@pytest.fixture
async def decode(start_node: StartNode) -> ScriptedNode:
    return await start_node("decode")


@pytest.fixture
async def router(start_node: StartNode, start_router: StartRouter, decode: ScriptedNode) -> Running:
    return await start_router(await start_node("prefill"), decode, api_key=(KEY,), sse_keep_alive_s=0.1)


@pytest.fixture
async def openai_client(router: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    import openai

    async with openai.AsyncOpenAI(base_url=router.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic_client(router: Running) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=router.url, api_key=KEY, max_retries=0) as client:
        yield client


async def test_responses(router: Running, openai_client: openai.AsyncOpenAI) -> None:
    chat = await openai_client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, temperature=0)
    asked: Any = {"model": "tiny", "input": "the fox", "max_output_tokens": 12, "temperature": 0}
    whole = await openai_client.responses.create(**asked, metadata={"run": "1"}, top_logprobs=1)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert whole.usage is not None and chat.usage is not None and whole.metadata == {"run": "1"}
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    (item,) = whole.output
    assert item.type == "message" and item.content[0].type == "output_text"
    assert item.content[0].logprobs is not None and len(item.content[0].logprobs) == 12

    deltas, last = "", None
    async with openai_client.responses.stream(**asked) as stream:
        async for event in stream:
            deltas += event.delta if event.type == "response.output_text.delta" else ""
            last = event
    assert last is not None and last.type == "response.incomplete"
    assert deltas == last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage or last.response.usage.input_tokens == whole.usage.input_tokens


async def test_messages(router: Running, anthropic_client: anthropic.AsyncAnthropic) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "max_tokens": 12}
    said = asked | {"temperature": 0}
    chat = (await router.http.post("/v1/chat/completions", json=said, headers={"x-api-key": KEY})).json()
    asked["extra_body"] = {"temperature": 0}
    text = chat["choices"][0]["message"]["content"]
    whole = await anthropic_client.messages.create(**asked, extra_headers={"X-Request-Id": "mine"})
    assert whole._request_id == "mine" and whole.id.startswith("msg_mine-")
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert (whole.stop_reason, whole.usage.output_tokens, whole.type) == ("max_tokens", 12, "message")
    async with anthropic_client.messages.stream(**asked) as stream:
        assert "".join([piece async for piece in stream.text_stream]) == text
        final = await stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 12
    stopped = await anthropic_client.messages.create(**asked, stop_sequences=[text[4:6]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[4:6])
    counted = await anthropic_client.messages.count_tokens(model="tiny", messages=HI)
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]
    lengthy = await anthropic_client.messages.count_tokens(model="tiny", messages=HI * 200)
    assert lengthy.input_tokens > 512 and lengthy.input_tokens > 100 * counted.input_tokens
    longest = await anthropic_client.messages.create(**{**asked, "max_tokens": 5000})
    assert longest.stop_reason == "model_context_window_exceeded"
    assert longest.usage.output_tokens == 512 - counted.input_tokens


async def test_errors_are_the_clients_own(
    router: Running, openai_client: openai.AsyncOpenAI, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    import anthropic
    import openai

    with pytest.raises(openai.BadRequestError, match="not stored here"):
        await openai_client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="'max_output_tokens' asks for 1000") as lengthy:
        await openai_client.responses.create(model="tiny", input="x", max_output_tokens=1000)
    assert lengthy.value.param == "max_output_tokens"
    with pytest.raises(anthropic.NotFoundError) as missing:
        await anthropic_client.messages.create(model="other", messages=HI, max_tokens=5)
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error") and body["request_id"]
    with pytest.raises(anthropic.AuthenticationError) as unknown:
        await anthropic_client.with_options(api_key="wrong").messages.create(model="tiny", messages=HI, max_tokens=5)
    wrong: Any = unknown.value.body
    assert wrong["error"]["type"] == "authentication_error"


async def test_an_end_in_the_middle(
    router: Running, decode: ScriptedNode, openai_client: openai.AsyncOpenAI, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    import anthropic

    decode.hold_after = 4
    asked: Any = {"model": "tiny", "messages": HI, "max_tokens": 50, "stream": True}
    lines = []
    async with router.http.stream("POST", "/v1/messages", json=asked, headers={"x-api-key": KEY}) as answer:
        async for line in answer.aiter_lines():
            lines.append(line)
            if line == "event: ping":
                router.router.end_all()
    assert lines[0] == "event: message_start" and "event: content_block_delta" in lines
    assert lines[-3] == "event: error" and "shutting down" in lines[-2]

    decode.hold.set()
    decode.hold_after = 4
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        async for event in await anthropic_client.messages.create(**asked):
            if event.type == "content_block_delta":
                router.router.end_all()
    decode.hold.set()
    decode.hold_after = 4
    last: Any = None
    async for last in await openai_client.responses.create(model="tiny", input="x", stream=True):
        if last.type == "response.output_text.delta":
            router.router.end_all()
    assert last.type == "response.failed" and "shutting down" in last.response.error.message
    decode.hold.set()
    await until(idle(decode), "nothing runs")
