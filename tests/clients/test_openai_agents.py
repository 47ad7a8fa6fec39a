"""OpenAI's Agents SDK over chats and over the Responses API."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from asked import KEY, QUESTION, City, look
from openai import AsyncOpenAI

set_tracing_disabled(True)
SETTINGS: Any = {"max_tokens": 80, "temperature": 0}


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
def test_agents(url: str, model: str, kind: Any) -> None:
    called: list[str] = []

    async def looked(name: str) -> str:
        called.append(name)
        return look(name)

    async def run() -> None:
        async with AsyncOpenAI(base_url=url, api_key=KEY) as client:
            served = kind(model=model, openai_client=client)
            plain, required = ModelSettings(**SETTINGS), ModelSettings(**SETTINGS, tool_choice="required")
            shaped = Agent(name="shaped", model=served, output_type=City, model_settings=plain)
            assert isinstance((await Runner.run(shaped, QUESTION)).final_output, City)
            tool = function_tool(looked, name_override="look")
            # what the tool says goes back, and the model answers in words
            caller = Agent(name="caller", model=served, tools=[tool], model_settings=required)
            assert (await Runner.run(caller, QUESTION)).final_output and called
            streamed = Runner.run_streamed(Agent(name="plain", model=served, model_settings=plain), QUESTION)
            kinds = {event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"}
            assert "response.output_text.delta" in kinds and "Paris" in streamed.final_output

    asyncio.run(run())
