"""LiteLLM as a library."""

from __future__ import annotations

import json
from typing import Any

import litellm
from asked import KEY, SAID, City


def test_litellm(url: str, model: str) -> None:
    to: Any = {"model": f"openai/{model}", "api_base": url, "api_key": KEY, "messages": SAID, "max_tokens": 80}
    tool = {"type": "function", "function": {"name": "city", "parameters": City.model_json_schema()}}
    answer = litellm.completion(**to, tools=[tool], tool_choice="required")
    City.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
    shaped = litellm.completion(**to, response_format=City)
    City.model_validate(json.loads(shaped.choices[0].message.content))
    stream = litellm.completion(**to, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
