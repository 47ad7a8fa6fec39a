"""Reasoning in chats' answers: deltas, whole messages and what is counted, also through the translated APIs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire.model import ModelBundle
from tests.api import tiny
from tests.router.conftest import Running, StartNode, StartRouter
from tests.router.scripted_node import COUNT, FIRST, expected
from tests.router.test_serving import events

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}<|start|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the fox"}]
THOUGHTS, TOKENS = 5, 12


def bundle(close_id: int) -> ModelBundle:
    """What the scripted model says are words, but for the token that closes its reasoning."""
    words = {f"Ġw{id}": id for id in range(FIRST, FIRST + COUNT) if id != close_id}
    letters = {letter: 200 + place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = {"<|end|>": 0, "<|start|>": 1, "<think>": 2, "</think>": close_id, **words, **letters}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>", "<think>", "</think>"])
    return msgspec.structs.replace(
        tiny.bundle(), tokenizer_json=tokenizer.to_str().encode(), chat_templates={"default": TEMPLATE}
    )


PROMPT = TextTokenizer(bundle(199).tokenizer_json).encode("the fox<|start|><think>\n", add_special_tokens=False)
OUTPUT = expected(PROMPT, TOKENS)
CLOSE = OUTPUT[THOUGHTS]
assert CLOSE not in OUTPUT[:THOUGHTS]
REASONING = "".join(f" w{id}" for id in OUTPUT[:THOUGHTS]).strip()
CONTENT = "".join(f" w{id}" for id in OUTPUT[THOUGHTS + 1 :] if id != CLOSE).strip()


@pytest.fixture
async def thinker(start_node: StartNode, start_router: StartRouter) -> Running:
    options: dict[str, Any] = {
        "bundle": bundle(CLOSE),
        "info": msgspec.structs.replace(tiny.info(), vocab_size=200 + 256),
    }
    return await start_router(await start_node("prefill", **options), await start_node("decode", **options))


def added(found: list[Any], name: str, index: int = 0) -> str:
    choices = [choice for event in found if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get(name) or "" for choice in choices if choice["index"] == index)


async def whole(running: Running, **body: Any) -> dict[str, Any]:
    answer = await running.post("/v1/chat/completions", messages=MESSAGES, max_tokens=TOKENS, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_streamed_and_whole(thinker: Running) -> None:
    document = await whole(thinker)
    message = document["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": CONTENT,
        "reasoning": REASONING,
        "reasoning_content": REASONING,
    }
    assert document["usage"]["completion_tokens_details"] == {"reasoning_tokens": THOUGHTS + 1}
    chat = {"messages": MESSAGES, "max_tokens": TOKENS, "stream_options": {"include_usage": True}}
    found = await events(thinker, "/v1/chat/completions", n=2, logprobs=True, **chat)
    plain = await events(thinker, "/v1/chat/completions", **chat)
    for streamed in (found, plain):
        assert added(streamed, "reasoning") == added(streamed, "reasoning_content") == REASONING
        assert added(streamed, "content") == CONTENT
    assert (
        added(found, "content", 1) and found[-2]["usage"]["completion_tokens_details"]["reasoning_tokens"] >= THOUGHTS
    )
    assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(len(event["choices"][0]["delta"]) for event in plain[:-2] if not event["choices"][0]["finish_reason"])


async def test_what_clients_may_say_of_it(thinker: Running) -> None:
    silent = (await whole(thinker, include_reasoning=False))["choices"][0]["message"]
    assert silent == {"role": "assistant", "content": CONTENT}
    stop = CONTENT.split()[3]
    stopped = (await whole(thinker, stop=[stop]))["choices"][0]["message"]
    assert stopped["content"] == CONTENT[: CONTENT.index(stop)] and stopped["reasoning"] == REASONING
    answered = await whole(thinker, enable_thinking=False)
    assert "reasoning" not in answered["choices"][0]["message"]
    assert "completion_tokens_details" not in answered["usage"]
    cut = (await whole(thinker, stop=[REASONING.split()[2]]))["choices"][0]["message"]
    assert not cut["content"] and cut["reasoning"] == " ".join(REASONING.split()[:2]) + " "


async def test_translated(thinker: Running) -> None:
    answer = await thinker.post("/v1/messages", messages=MESSAGES, max_tokens=TOKENS)
    thought, said = answer.json()["content"]
    assert (thought["type"], thought["thinking"], said["text"]) == ("thinking", REASONING, CONTENT)
    answer = await thinker.post("/v1/responses", input="the fox", max_output_tokens=TOKENS + 4)
    thought, said = answer.json()["output"]
    assert thought["content"][0]["text"] == REASONING and said["content"][0]["text"].startswith(CONTENT)
    assert answer.json()["usage"]["output_tokens_details"]["reasoning_tokens"] == THOUGHTS + 1


async def test_none(start_node: StartNode, start_router: StartRouter) -> None:
    options: dict[str, Any] = {
        "bundle": bundle(CLOSE),
        "info": msgspec.structs.replace(tiny.info(), vocab_size=200 + 256),
    }
    nodes = [await start_node(role, **options) for role in ("prefill", "decode")]
    message = (await whole(await start_router(*nodes, reasoning_parser="none")))["choices"][0]["message"]
    assert message["content"].split() == [*REASONING.split(), *CONTENT.split()] and "reasoning" not in message
