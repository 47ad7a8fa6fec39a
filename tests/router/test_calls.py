"""Reasoning and tool calls of a chat, streamed and whole, from the tokens that nodes make to what a client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.router.conftest import Running, StartNode, StartRouter

TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
HI = [{"role": "user", "content": "x"}]
SAID = '<think>so</think>\n\nLook:\n<tool_call>{"name": "sum", "arguments": {"a": [1, "é"]}}</tool_call>'
CALL = {"name": "sum", "arguments": '{"a": [1, "é"]}'}


class Speaks:
    """A router whose nodes say a text."""

    def __init__(self, router: Running, nodes: list[Any]) -> None:
        self.router = router
        self._nodes = nodes

    async def chat(self, said: str, **body: Any) -> Any:
        text = self.router.router.registry.find("tiny").text  # type: ignore[union-attr]
        for node in self._nodes:
            node.script = text.tokenizer.encode(said, add_special_tokens=False)
        body = {"messages": HI, "max_tokens": 200, "tools": TOOLS} | body
        answer = await self.router.post("/v1/chat/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer


@pytest.fixture
async def speaks(start_node: StartNode, start_router: StartRouter) -> Speaks:
    nodes = [await start_node("prefill"), await start_node("decode")]
    return Speaks(await start_router(*nodes, reasoning_parser="qwen3"), nodes)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_streamed_and_whole(speaks: Speaks) -> None:
    whole = (await speaks.chat(SAID)).json()
    choice, message = whole["choices"][0], whole["choices"][0]["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Look:", "so", "so")
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]) == ("function", CALL) and call["id"].startswith("call_")
    details = whole["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < whole["usage"]["completion_tokens"]

    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *streamed, last, usage = events((await speaks.chat(SAID, **options)).text)
    deltas = [event["choices"][0]["delta"] for event in streamed]
    for name in ("content", "reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    first, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first["function"] == {"name": "sum", "arguments": ""} and first["id"] and len(more) > 1
    assert "".join(part["function"]["arguments"] for part in more) == CALL["arguments"]
    assert {part["index"] for part in [first, *more]} == {0}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["completion_tokens_details"] == details


async def test_every_step_has_its_scores_and_ids(speaks: Speaks) -> None:
    options: dict[str, Any] = {"logprobs": True, "return_token_ids": True}
    whole = (await speaks.chat(SAID, **options)).json()["choices"][0]
    streamed = [e["choices"][0] for e in events((await speaks.chat(SAID, stream=True, **options)).text)]
    assert [id for choice in streamed for id in choice.get("token_ids") or ()] == whole["token_ids"]
    scores = [score for choice in streamed for score in (choice["logprobs"] or {"content": []})["content"]]
    assert scores == whole["logprobs"]["content"]


async def test_without_tools_or_reasoning_it_is_content(speaks: Speaks) -> None:
    hidden = (await speaks.chat(SAID, tool_choice="none", include_reasoning=False)).json()["choices"][0]
    assert hidden["message"] == {"role": "assistant", "content": SAID.partition("</think>")[2].lstrip()}
    assert hidden["finish_reason"] == "stop"


async def test_one_call_at_most(speaks: Speaks) -> None:
    said = SAID + SAID.partition("Look:")[2]
    both, one = [
        (await speaks.chat(said, parallel_tool_calls=several)).json()["choices"][0]["message"]["tool_calls"]
        for several in (True, False)
    ]
    assert (len(both), len(one)) == (2, 1) and both[1]["function"] == one[0]["function"]
