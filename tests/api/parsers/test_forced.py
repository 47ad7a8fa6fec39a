"""Grammars of calls that must be made."""

from __future__ import annotations

import json
from typing import Any

from pd_serve.api.parsers.forced import forced_grammar
from pd_serve.api.schemas import ChatCompletionRequest

TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}, "again": {"$ref": "#"}},
    "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
}


def schema(**fields: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": "f", "parameters": TREE}}]
    tools.append({"type": "function", "function": {"name": "g"}})
    request = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": tools, **fields}
    )
    grammar = forced_grammar(request, (7,))
    assert grammar is not None and (grammar.kind, grammar.after) == ("json_schema", (7,))
    return dict(json.loads(grammar.text))


def resolved(whole: dict[str, Any], reference: str) -> Any:
    found: Any = whole
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def test_each_function_keeps_its_own_references() -> None:
    whole = schema(tool_choice="required")
    f, g = whole["items"]["anyOf"]
    assert [kind["properties"]["name"] for kind in (f, g)] == [{"const": "f"}, {"const": "g"}]
    tree = resolved(whole, f["properties"]["parameters"]["$ref"])
    node = resolved(whole, tree["properties"]["root"]["$ref"])
    assert node["type"] == "array" and resolved(whole, node["items"]["$ref"]) is node
    assert resolved(whole, tree["properties"]["again"]["$ref"]) is tree
    assert resolved(whole, g["properties"]["parameters"]["$ref"]) == {"type": "object", "properties": {}}
    assert (whole["minItems"], "maxItems" in whole) == (1, False)


def test_one_call_or_one_function() -> None:
    assert schema(tool_choice="required", parallel_tool_calls=False)["maxItems"] == 1
    named = schema(tool_choice={"type": "function", "function": {"name": "f"}})
    assert {key: named[key] for key in TREE} == TREE
