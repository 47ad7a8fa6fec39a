"""The Responses and the Messages API with their own clients, and LangChain over chats, against the real thing."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pydantic
import pytest

from tests.e2e.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
QUESTION = "What is the capital of France?"


def test_both_apis_answer_as_a_chat_does(smol: Cluster) -> None:
    import anthropic
    import openai

    client = openai.OpenAI(base_url=smol.url + "/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    said: Any = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=model, messages=said, temperature=0, max_tokens=30)
    text = chat.choices[0].message.content
    assert text is not None and "Paris" in text

    with client.responses.stream(model=model, input=QUESTION, temperature=0, max_output_tokens=30) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        response = events.get_final_response()
    assert "".join(deltas) == response.output_text == text and response.status == "completed"
    # What was answered goes back as it came.
    asked_again: Any = {"model": model, "temperature": 0}
    again = client.responses.create(input=[*said, *response.output, *said], max_output_tokens=5, **asked_again)
    turns: Any = [*said, {"role": "assistant", "content": text}, *said]
    chat_again = client.chat.completions.create(messages=turns, max_tokens=5, **asked_again)
    assert again.output_text == chat_again.choices[0].message.content
    assert again.usage is not None and again.usage.input_tokens_details.cached_tokens > 0
    assert again.usage.input_tokens == chat_again.usage.prompt_tokens  # type: ignore[union-attr]

    claude = anthropic.Anthropic(base_url=smol.url, api_key="none", max_retries=0)
    asked: Any = {"model": model, "messages": said, "max_tokens": 30, "extra_body": {"temperature": 0}}
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    cached = message.usage.cache_read_input_tokens or 0
    assert cached + message.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    smol.assert_idle()


def test_both_apis_call_tools_and_keep_to_schemas(smol: Cluster) -> None:
    import anthropic
    import openai

    client = openai.OpenAI(base_url=smol.url + "/v1", api_key="none", max_retries=0)
    claude = anthropic.Anthropic(base_url=smol.url, api_key="none", max_retries=0)
    asked: Any = {"model": client.models.list().data[0].id}
    schema: Any = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }

    class City(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        city: Literal["Paris", "Rome"]

    async def parsed_chat() -> Any:
        async with openai.AsyncOpenAI(base_url=smol.url + "/v1", api_key="none", max_retries=0) as there:
            return await there.chat.completions.parse(messages=turn, response_format=City, max_tokens=40, **asked)

    turn: Any = [{"role": "user", "content": QUESTION}]
    here = client.chat.completions.parse(messages=turn, response_format=City, max_tokens=40, **asked)
    for chat in (here, asyncio.run(parsed_chat())):
        assert isinstance(chat.choices[0].message.parsed, City)
    parsed = client.responses.parse(input=QUESTION, text_format=City, max_output_tokens=60, **asked)
    assert parsed.output_parsed is not None and parsed.output_parsed.city in ("Paris", "Rome")
    tool: Any = {"type": "function", "name": "look", "parameters": schema, "strict": True}
    with client.responses.stream(input=QUESTION, tools=[tool], tool_choice="required", **asked) as events:
        called = events.get_final_response().output
    assert [item.type for item in called] == ["function_call"]
    result: Any = {"type": "function_call_output", "call_id": called[0].call_id, "output": "sunny"}  # type: ignore[union-attr]
    told: Any = [{"role": "user", "content": QUESTION}, *called, result]
    assert client.responses.create(
        input=told, tools=[tool], tool_choice="none", max_output_tokens=5, **asked
    ).output_text

    look: Any = {"name": "look", "input_schema": schema}
    named: Any = {"type": "tool", "name": "look"}
    with claude.messages.stream(messages=turn, tools=[look], tool_choice=named, max_tokens=60, **asked) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert message.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "look"
    assert City.model_validate(block.input)
    turn += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]},
    ]
    assert 0 < claude.messages.create(messages=turn, tools=[look], max_tokens=5, **asked).usage.output_tokens <= 5
    smol.assert_idle()


def test_langchain_keeps_to_schemas_and_calls_tools(smol: Cluster) -> None:
    from langchain_openai import ChatOpenAI

    class City(pydantic.BaseModel):
        """A city."""

        name: Literal["Paris", "Rome"]

    asked: Any = {"base_url": smol.url + "/v1", "api_key": "none", "max_tokens": 40, "stream_usage": True}
    chat = ChatOpenAI(model=smol.router.get("/v1/models")["data"][0]["id"], temperature=0, **asked)
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)  # type: ignore[arg-type]
    called: Any = chat.bind_tools([City], tool_choice="required").invoke(QUESTION)
    assert called.tool_calls[0]["name"] == "City" and City.model_validate(called.tool_calls[0]["args"])
    whole: Any = None
    for chunk in chat.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert "Paris" in whole.content and whole.usage_metadata["output_tokens"] > 0
    smol.assert_idle()
