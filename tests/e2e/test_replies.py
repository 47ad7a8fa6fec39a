"""The Responses and the Messages API with their own clients, against the real thing."""

from __future__ import annotations

from typing import Any

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
