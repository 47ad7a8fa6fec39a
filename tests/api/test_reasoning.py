"""Where prompts leave a model's reasoning, and from where on a grammar holds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tokenizers import AddedToken, Tokenizer

from pd_serve.api.outputs import ParserNames
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.api.text_model import TextModel
from tests.api import tiny

SWITCHED = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|start|>assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENING = SWITCHED.replace("{% endif %}", "{% else %}<think>\n{% endif %}")
NEVER_SAID = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<|start|>assistant:"
NAMES = ParserNames()
TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "required",
}
CALLS = '[{"name": "f", "parameters": {}}]'


def model(template: str, *, marks_are_tokens: bool = True) -> TextModel:
    tokenizer = Tokenizer.from_buffer(tiny.byte_level())
    if marks_are_tokens:
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<think>", "</think>")])
    bundle = msgspec.structs.replace(
        tiny.bundle(), tokenizer_json=tokenizer.to_str().encode(), chat_templates={"default": template}
    )
    return TextModel(bundle, tiny.info())


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "<think>"}], **fields})


def said(text: TextModel, request: ChatCompletionRequest, output: str, names: ParserNames = NAMES) -> dict[str, Any]:
    parser = text.outputs.message_parser(request, text.chat_prompt(request).ids, names)
    if parser is None:
        return {"content": output}
    for character in output:
        parser.feed(character, 1)
    parser.finish()
    return parser.message()


@pytest.mark.parametrize(
    ("template", "fields", "output", "reasoning", "later"),
    [
        # A prompt that opens the reasoning, or closes it, or leaves it to the model.
        (OPENING, {}, "a</think>b", "a", True),
        (OPENING, {"enable_thinking": False}, "b", None, False),
        (OPENING, {"reasoning_effort": "none"}, "b", None, False),
        (SWITCHED, {}, "<think>a</think>b", "a", True),
        (SWITCHED, {"chat_template_kwargs": {"enable_thinking": False}}, "b", None, False),
        # Nobody knows whether this one thinks: a grammar would hold for the whole output.
        (NEVER_SAID, {}, "<think>a</think>b", "a", False),
    ],
)
def test_where_a_prompt_leaves_it(
    template: str, fields: dict[str, Any], output: str, reasoning: str | None, later: bool
) -> None:
    text = model(template)
    assert said(text, chat(**fields), output).get("reasoning") == reasoning
    close = tuple(text.tokenizer.encode("</think>", add_special_tokens=False))
    for form in ({"guided_json": {}}, TOOLS):
        request = chat(**fields, **form)
        wanted = text.outputs.wanted_grammar(request, text.chat_prompt(request).ids, NAMES)
        assert wanted is not None and wanted.grammar.after == (close if later else ())
    called = said(text, chat(**fields, **TOOLS), output.removesuffix("b") + CALLS)
    assert called.get("reasoning") == reasoning and called["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("content", "output", "reasoning"),
    [("<think>so", "it</think>b", "it"), ("<think>so</think>", "a</think>b", None), ("Hi", "a", None)],
)
def test_a_final_message_that_goes_on(content: str, output: str, reasoning: str | None) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    for template in (SWITCHED, OPENING):
        request = chat(messages=messages, continue_final_message=True)
        for names in (NAMES, ParserNames(reasoning="deepseek_r1")):
            assert said(model(template), request, output, names).get("reasoning") == reasoning


def test_one_that_always_thinks() -> None:
    text, request = model(NEVER_SAID), chat(guided_json={})
    always = ParserNames(reasoning="deepseek_r1")
    assert said(text, request, "a</think>b", always)["reasoning"] == "a"
    prompt = text.chat_prompt(request).ids
    assert len(text.outputs.reasoning_end(request, prompt, always)) == 1
    assert text.outputs.reasoning_end(request, prompt, NAMES) == ()


def test_marks_of_several_tokens() -> None:
    """Nothing could tell a grammar when to begin: it holds for all, so all is the answer."""
    text = model(OPENING, marks_are_tokens=False)
    assert said(text, chat(), "a</think>b")["reasoning"] == "a"
    assert said(text, chat(guided_json={}), '{"a": 1}')["content"] == '{"a": 1}'
    assert said(text, chat(**TOOLS), CALLS)["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_an_answer_in_a_form_or_a_call_if_the_model_likes() -> None:
    tools = {**TOOLS, "tool_choice": "auto"}
    for fields, kind in ((tools, "or_calls"), ({**tools, "tool_choice": "none"}, "json_schema"), ({}, "json_schema")):
        text, request = model(OPENING), chat(**fields, guided_json={})
        wanted = text.outputs.wanted_grammar(request, text.chat_prompt(request).ids, NAMES)
        assert wanted is not None and wanted.grammar.kind == kind and wanted.grammar.after
    request = chat(**tools, guided_json={})
    called = said(text, request, 'so</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert called["tool_calls"][0]["function"]["name"] == "f" and called["reasoning"] == "so"
    assert said(text, request, 'so</think>\n{"a": 1}')["content"] == '{"a": 1}'


def test_channels_have_no_place_for_a_grammar() -> None:
    text, channels = model(NEVER_SAID), ParserNames(reasoning="openai_gptoss")
    request = chat(**TOOLS)
    assert text.outputs.reasoning_end(request, text.chat_prompt(request).ids, channels) == ()
    assert said(text, request, CALLS, channels)["tool_calls"][0]["function"]["name"] == "f"
