"""Each client as its users write it, untouched, with a model of 135 million parameters behind.

Run by `make test-clients` in an environment of its own: these packages are no part of pd-serve's.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from conftest import QUESTION, City

SAID: list[Any] = [{"role": "user", "content": QUESTION}]
KEY = "none"


def test_openai(url: str, model: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY)
    assert client.models.retrieve(model).id == model
    parsed = client.chat.completions.parse(model=model, messages=SAID, response_format=City, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, City)
    response = client.responses.parse(model=model, input=QUESTION, text_format=City, max_output_tokens=60)
    assert isinstance(response.output_parsed, City)
    tool = openai.pydantic_function_tool(City)
    called = client.chat.completions.create(
        model=model, messages=SAID, tools=[tool], tool_choice="required", max_tokens=80
    )
    (call, *_) = called.choices[0].message.tool_calls or ()
    City.model_validate_json(call.function.arguments)  # type: ignore[union-attr]


def test_openai_async_stream(url: str, model: str) -> None:
    import openai

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model=model, messages=SAID, max_tokens=30, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert "Paris" in asyncio.run(run())


def test_anthropic(url: str, model: str) -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY)
    tool: Any = {"name": "city", "description": "", "input_schema": City.model_json_schema()}
    message = client.messages.create(
        model=model, max_tokens=80, messages=SAID, tools=[tool], tool_choice={"type": "tool", "name": "city"}
    )
    (block,) = message.content
    assert block.type == "tool_use" and message.stop_reason == "tool_use"
    City.model_validate(block.input)
    with client.messages.stream(model=model, max_tokens=30, messages=SAID) as stream:
        assert "".join(stream.text_stream)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(url: str, model: str, mode: str) -> None:
    import instructor
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=getattr(instructor.Mode, mode))
    found = client.chat.completions.create(
        model=model, messages=SAID, response_model=City, max_retries=0, max_tokens=80
    )
    assert isinstance(found, City)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured(url: str, model: str, method: Any) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, max_tokens=80)  # type: ignore[call-arg, arg-type]
    assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_langchain_tools_and_stream(url: str, model: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, max_tokens=80, stream_usage=True)  # type: ignore[call-arg, arg-type]
    message = chat.bind_tools([City], tool_choice="required").invoke(QUESTION)
    assert message.tool_calls and message.tool_calls[0]["name"] == "City"  # type: ignore[attr-defined]
    whole = None
    for chunk in chat.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.content and whole.usage_metadata["output_tokens"] > 0  # type: ignore[attr-defined]


def test_litellm(url: str, model: str) -> None:
    import litellm

    to: Any = {"model": f"openai/{model}", "api_base": url, "api_key": KEY, "messages": SAID, "max_tokens": 80}
    tool = {"type": "function", "function": {"name": "city", "parameters": City.model_json_schema()}}
    answer = litellm.completion(**to, tools=[tool], tool_choice="required")
    City.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
    shaped = litellm.completion(**to, response_format=City)
    City.model_validate(json.loads(shaped.choices[0].message.content))
    stream = litellm.completion(**to, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
