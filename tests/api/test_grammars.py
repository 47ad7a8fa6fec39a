"""Request fields to grammars."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pd_serve.api.errors import APIError
from pd_serve.api.grammars import NO_WHITESPACE, Wanted, wanted_grammar
from pd_serve.api.parsing import parse
from pd_serve.api.schemas import CompletionRequest
from pd_serve.wire.link import Grammar

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{}}}'


def wanted(**fields: Any) -> Wanted | None:
    return wanted_grammar(parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode()))


@pytest.mark.parametrize(
    ("fields", "param", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "response_format",
            Grammar("json_schema", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", Grammar("json_schema", TEXT)),
        ({"guided_json": TEXT}, "guided_json", Grammar("json_schema", TEXT)),
        ({"guided_json": True}, "guided_json", Grammar("json_schema", "true")),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", Grammar("regex", "a+")),
        ({"guided_choice": ["é", "b"]}, "guided_choice", Grammar("choice", '["é","b"]')),
        (
            {"response_format": {"type": "structural_tag", "structures": [{"begin": "<f>"}], "triggers": ["<f"]}},
            "response_format",
            Grammar("structural_tag", '{"structures":[{"begin":"<f>"}],"triggers":["<f"]}'),
        ),
        (
            {"structured_outputs": {"structural_tag": {"format": {"type": "any_text"}}}},
            "structured_outputs.structural_tag",
            Grammar("structural_tag", '{"format":{"type":"any_text"}}'),
        ),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar", Grammar("ebnf", 'root ::= "a"')),
    ],
)
def test_each_field_is_a_grammar(fields: dict[str, Any], param: str, grammar: Grammar) -> None:
    assert wanted(**fields) == (param, grammar)


def test_no_field_is_none() -> None:
    nulls = dict.fromkeys(("response_format", "structured_outputs", "guided_json", "guided_choice"))
    assert wanted(**nulls) is wanted(response_format={"type": "text"}) is None


def test_white_space_is_said_in_the_schema() -> None:
    for fields, options in (
        ({"guided_json": TEXT, "guided_whitespace_pattern": " ?"}, {"whitespace_pattern": " ?"}),
        ({"structured_outputs": {"json": True, "disable_any_whitespace": True}}, NO_WHITESPACE),
    ):
        found = wanted(**fields)
        assert found is not None and json.loads(found.grammar.text)["x-guidance"] == options


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema"),
    ],
)
def test_what_contradicts_itself(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(APIError) as caught:
        wanted(**fields)
    assert caught.value.status == 400 and caught.value.param == param
