"""OpenAI's client, sync and async: chats and the Responses API."""

from __future__ import annotations

import asyncio

import openai
from asked import KEY, QUESTION, SAID, City


def test_openai(url: str, model: str) -> None:
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
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model=model, messages=SAID, max_tokens=30, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert "Paris" in asyncio.run(run())
