"""LangChain's chat model of OpenAI's API."""

from __future__ import annotations

from typing import Any

import pytest
from asked import KEY, QUESTION, City
from langchain_openai import ChatOpenAI


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured(url: str, model: str, method: Any) -> None:
    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, max_tokens=80)  # type: ignore[call-arg, arg-type]
    assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_langchain_tools_and_stream(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, max_tokens=80, stream_usage=True)  # type: ignore[call-arg, arg-type]
    message = chat.bind_tools([City], tool_choice="required").invoke(QUESTION)
    assert message.tool_calls and message.tool_calls[0]["name"] == "City"  # type: ignore[attr-defined]
    whole = None
    for chunk in chat.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.content and whole.usage_metadata["output_tokens"] > 0  # type: ignore[attr-defined]
