"""Structural tags, and answers that may be calls, as llguidance reads them over a tiny tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from pd_serve.api.grammars import or_calls
from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.grammar.forms import GrammarError, lower
from pd_serve.grammar.messages import Load
from pd_serve.grammar.worker import Model
from pd_serve.wire.link import Grammar
from tests.api import tiny

TEXT = TextTokenizer(tiny.byte_level())
MODEL = Model(Load("", TEXT.size, [tiny.EOS], tiny.byte_level()))
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SPECIAL = "<tool>"  # one token of the tokenizer


def allows(grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(MODEL._tokenizer, lower(grammar, MODEL.special))
    assert not matcher.is_error(), matcher.get_error()
    ids = TEXT.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def tag(spec: Any) -> Grammar:
    return Grammar("structural_tag", json.dumps(spec))


def structure(begin: str, end: str) -> dict[str, Any]:
    return {"begin": begin, "schema": NUMBER, "end": end}


OLD = {"structures": [structure("<f=x>", "</f>"), structure("<f=y>", "</f>")], "triggers": ["<f="]}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("Hello", True),
        ('<f=x>{"a": 1}</f>', True),
        ('So <f=x>{"a": 1}</f> and <f=y>{"a":2}</f>.', True),
        ("a < f <f", True),
        ('So <f=x>{"b": 1}</f>', False),
        ("So <f=z>", False),
        ('<f=x>{"a": 1}', False),
    ],
)
def test_what_begins_with_a_trigger_is_a_tag(text: str, fits: bool) -> None:
    assert allows(tag(OLD), text) == fits


def test_a_trigger_may_be_a_special_token() -> None:
    assert MODEL.special(SPECIAL) is not None and MODEL.special("<f") is None
    grammar = tag({"structures": [structure(f"{SPECIAL}x", SPECIAL)], "triggers": [SPECIAL]})
    call = SPECIAL + 'x{"a": 1}'
    assert allows(grammar, "Hi") and allows(grammar, f"Hi {call}{SPECIAL}!")
    assert not allows(grammar, f"Hi {SPECIAL}y") and not allows(grammar, f"Hi {call}!")


def triggered(**fields: Any) -> Grammar:
    one = {"begin": "<f>", "content": {"type": "const_string", "value": "1"}, "end": "</f>"}
    return tag({"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [one], **fields}})


@pytest.mark.parametrize(
    ("fields", "none", "behind", "two"),
    [
        ({}, True, True, True),
        ({"at_least_one": True}, False, True, True),
        ({"stop_after_first": True}, True, False, False),
        ({"stop_after_first": True, "at_least_one": True}, False, False, False),
    ],
)
def test_how_many_tags(fields: dict[str, Any], none: bool, behind: bool, two: bool) -> None:
    found = [allows(triggered(**fields), text) for text in ("no", "a<f>1</f>", "a<f>1</f>b", "<f>1</f><f>1</f>")]
    assert found == [none, True, behind, two]


def test_formats_are_made_of_others() -> None:
    choices = [
        {"type": "const_string", "value": "yes"},
        {"type": "regex", "pattern": "[0-9]+/[0-9]"},
        {"type": "json_schema", "json_schema": NUMBER},
    ]
    thought = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
    grammar = tag({"format": {"type": "sequence", "elements": [thought, {"type": "or", "elements": choices}]}})
    for text in ("yes", "12/3", '{"a": 5}'):
        assert allows(grammar, f"<think>well </thin</think>{text}") and not allows(grammar, text)
    assert not allows(grammar, "<think>well</think>maybe") and not allows(grammar, "<think>well yes")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "'format', or 'structures'"),
        ([], "an object"),
        ({**OLD, "triggers": ["<g"]}, "begins with none of the 'triggers'"),
        ({**OLD, "structures": []}, "at least one"),
        ({"format": {"type": "qwen_xml_parameter"}}, "const_string, json_schema"),
        ({"format": {"type": "tag", "begin": "", "content": {"type": "any_text"}}}, "at least one character"),
    ],
)
def test_what_is_no_structural_tag_is_named(spec: Any, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        lower(tag(spec))


@pytest.mark.parametrize("after", [(), (5,)])
def test_an_answer_in_its_form_or_a_call(after: tuple[int, ...]) -> None:
    inner = Grammar("json_schema", json.dumps(NUMBER), after)
    grammar = or_calls(inner, ["<tool_call>", SPECIAL])
    assert grammar.after == after
    for text in ('{"a": 1}', "<tool_call>any\nthing", f"{SPECIAL}f{SPECIAL}"):
        assert allows(grammar, text) and allows(grammar, "\n\n" + text) == bool(after)
    for text in ("Hello", '{"b": 1}', "<tool"):
        assert not allows(grammar, text)
    for kind, text in (("choice", '["a"]'), ("regex", "a"), ("ebnf", 'root ::= "a"')):
        grammar = or_calls(Grammar(kind, text), ["<tool_call>"])
        assert allows(grammar, "a") and allows(grammar, "<tool_call>x") and not allows(grammar, "b")
