"""Pydantic AI over chats, the Responses and the Messages API."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asked import KEY, QUESTION, City
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS: Any = {"max_tokens": 120, "temperature": 0}


@pytest.fixture(params=["chat", "responses", "messages"])
def served(request: pytest.FixtureRequest, base: str, url: str, model: str) -> Any:
    if request.param == "messages":
        return AnthropicModel(model, provider=AnthropicProvider(base_url=base, api_key=KEY))
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(model, provider=OpenAIProvider(base_url=url, api_key=KEY))


def test_structured(served: Any) -> None:
    """By a tool that must be called; where the client knows that the API has it, by the output's form as well."""
    forms: list[Any] = [City] if isinstance(served, AnthropicModel) else [City, NativeOutput(City)]
    for form in forms:
        agent = Agent(served, output_type=form, model_settings=SETTINGS)
        assert isinstance(agent.run_sync(QUESTION).output, City)


def test_stream(served: Any) -> None:
    async def run() -> str:
        async with Agent(served, model_settings=SETTINGS).run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert "Paris" in asyncio.run(run())
