"""Anthropic's client: the Messages API."""

from __future__ import annotations

from typing import Any

import anthropic
from asked import KEY, SAID, City


def test_anthropic(url: str, model: str) -> None:
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
