"""The official client, sync and async, streaming and not, against the real thing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cluster import Cluster

if TYPE_CHECKING:
    import openai  # takes seconds, and each worker imports all files of tests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def running(smol: Cluster) -> Iterator[Cluster]:
    with smol.another_router(smol.prefills, smol.decodes, api_key="sk-test") as one:
        yield one


@pytest.fixture
def client(running: Cluster) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=running.url + "/v1", api_key="sk-test", max_retries=0)


def test_models_and_chat(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    answer = client.chat.completions.create(model=model.id, messages=MESSAGES, temperature=0, max_tokens=30)  # type: ignore[call-overload]
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=20, logprobs=True, top_logprobs=2
    )  # type: ignore[call-overload]
    text, tokens, usage, finish = "", [], None, None
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )  # type: ignore[call-overload]
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            tokens += [t.token for t in (choice.logprobs.content if choice.logprobs else [])]
    assert text == whole.choices[0].message.content
    assert tokens == [t.token for t in whole.choices[0].logprobs.content]
    assert usage == whole.usage
    assert finish == whole.choices[0].finish_reason


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def test_calls_that_must_be_made(client: openai.OpenAI) -> None:
    """By a model that would make none."""
    asked: Any = {"model": client.models.list().data[0].id, "messages": MESSAGES, "temperature": 0, "max_tokens": 80}
    asked["tools"] = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("f", "g")]
    one = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert (one.finish_reason, one.message.content) == ("tool_calls", None)
    (call,) = one.message.tool_calls
    assert call.function.name in ("f", "g") and json.loads(call.function.arguments).keys() == {"city", "days"}

    named = {"type": "function", "function": {"name": "g"}}
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        names = {event.name for event in stream if event.type == "tool_calls.function.arguments.delta"}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.name == "g" and names == {"g"}
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


async def test_async_completions_with_stop_and_n(running: Cluster) -> None:
    import openai

    client = openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="sk-test", max_retries=0)
    model = (await client.models.list()).data[0].id
    answer = await client.completions.create(
        model=model,
        prompt=["1, 2, 3, 4,", "The days of the week are Monday,"],
        n=2,
        seed=7,
        temperature=0.8,
        max_tokens=24,
        stop=[" 7", "Friday"],
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert all(" 7" not in c.text and "Friday" not in c.text for c in answer.choices)
    parts: dict[int, str] = {}
    async for chunk in await client.completions.create(
        model=model,
        prompt=["1, 2, 3, 4,", "The days of the week are Monday,"],
        n=2,
        seed=7,
        temperature=0.8,
        max_tokens=24,
        stop=[" 7", "Friday"],
        stream=True,
    ):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
    assert parts == {c.index: c.text for c in answer.choices}


def test_errors_are_the_clients_own_types(running: Cluster, client: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=running.url + "/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-nothing", prompt="x")
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model=model, prompt=[5] * 9000, max_tokens=5)
    running.assert_idle()
