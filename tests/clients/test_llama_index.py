"""LlamaIndex's client for servers of OpenAI's API."""

from __future__ import annotations

import pytest
from asked import KEY, QUESTION, City, look
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


@pytest.fixture
def llm(url: str, model: str) -> OpenAILike:
    chats = {"is_chat_model": True, "is_function_calling_model": True}
    return OpenAILike(model=model, api_base=url, api_key=KEY, max_tokens=80, context_window=8192, **chats)


def test_text_and_streams(llm: OpenAILike) -> None:
    assert llm.complete(QUESTION).text
    assert "".join(part.delta or "" for part in llm.stream_complete(QUESTION))


def test_structured(llm: OpenAILike) -> None:
    assert isinstance(llm.structured_predict(City, PromptTemplate("{question}"), question=QUESTION), City)
    assert isinstance(llm.as_structured_llm(City).complete(QUESTION).raw, City)


def test_tools(llm: OpenAILike) -> None:
    answer = llm.chat_with_tools([FunctionTool.from_defaults(look)], user_msg=QUESTION, tool_required=True)
    (call, *_) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "look" and isinstance(call.tool_kwargs["name"], str)
