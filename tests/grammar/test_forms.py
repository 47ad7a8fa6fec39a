"""What fields of requests make of a grammar, as llguidance reads it."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from pd_serve.api.grammars import NO_WHITESPACE, json_schema, wanted_grammar
from pd_serve.api.parsers.forced import forced_grammar
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.grammar.forms import lower
from pd_serve.wire.link import Grammar

BYTES = LLTokenizer("byte")
NUMBERS = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
CALL = '{"name":"f","parameters":{"a":[1,2]}}'


def allows(grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(BYTES, lower(grammar))
    ids = BYTES.tokenize_str(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("text", ['{"a":[1,2]}', '{ "a": [1, 2] }', '{"a":[1,\n 2]}'])
def test_white_space_where_it_is_wanted(text: str) -> None:
    assert allows(json_schema(NUMBERS), text)
    assert allows(json_schema(NUMBERS, options=NO_WHITESPACE), text) == (" " not in text)


def forced(choice: object, **fields: object) -> Grammar:
    tools = [{"type": "function", "function": {"name": name, "parameters": NUMBERS}} for name in ("f", "g")]
    body = {"messages": [{"role": "user", "content": "?"}], "tools": tools, "tool_choice": choice, **fields}
    found = forced_grammar(ChatCompletionRequest.model_validate(body))
    assert found is not None
    return found


def test_calls_that_must_be_made() -> None:
    for text in (f"[{CALL}]", f"[{CALL},{CALL.replace('f', 'g', 1)}]"):
        assert allows(forced("required"), text)
    assert not allows(forced("required", parallel_tool_calls=False), f"[{CALL},{CALL}]")
    for text in ("[]", f"[ {CALL}]", CALL, f"[{CALL.replace('f', 'h', 1)}]", f"[{CALL.replace('1', 'true')}]"):
        assert not allows(forced("required"), text)
    named = forced({"type": "function", "function": {"name": "g"}})
    assert allows(named, '{"a":[]}') and not allows(named, '{"a":[ ]}') and not allows(named, "{}")


@pytest.mark.parametrize(
    ("more", "further"),
    [
        ({}, False),
        ({"additionalProperties": True}, True),
        ({"patternProperties": {"^c": {"type": "integer"}}}, True),
        ({"allOf": [{"properties": {"c": {"type": "integer"}}}]}, True),
    ],
)
def test_further_properties_come_where_the_schema_speaks_of_them(more: dict[str, Any], further: bool) -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], **more}
    for schema, form in ((inner, "%s"), ({"type": "array", "items": inner}, "[%s]")):
        assert allows(json_schema(schema), form % '{"a": 1}')
        assert allows(json_schema(schema), form % '{"a": 1, "c": 2}') == further


def test_a_json_object_may_have_a_schema() -> None:
    asked = {
        "messages": [{"role": "user", "content": "?"}],
        "response_format": {"type": "json_object", "schema": NUMBERS},
    }
    wanted = wanted_grammar(ChatCompletionRequest.model_validate(asked))
    assert wanted is not None and wanted.grammar == json_schema(NUMBERS)
