"""``tool_choice`` that leaves the model no choice: the grammar of its whole output, which the parsers then read."""

from __future__ import annotations

from typing import Any

from pd_serve.api import grammars
from pd_serve.api.messages import Tool
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.wire.link import Grammar

_NOTHING = {"type": "object", "properties": {}}  # of a function without parameters


def forced_grammar(request: ChatCompletionRequest, after: tuple[int, ...] = ()) -> Grammar | None:
    """Of "required": a list of calls. Of a named function: its arguments. None: the model decides.

    Without white space, which a weak model writes without end.

    ``after``: as in :class:`~pd_serve.wire.link.Grammar`.
    """
    if request.tool_named is not None:
        return grammars.json_schema(parameters(request.tool_named), after, grammars.NO_WHITESPACE)
    if request.tool_choice != "required":
        return None
    schema = calls_schema(request.tools or [], several=request.parallel_tool_calls is not False)
    return grammars.json_schema(schema, after, grammars.NO_WHITESPACE)


def parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or _NOTHING


def calls_schema(tools: list[Tool], *, several: bool) -> dict[str, Any]:
    """Each tool's schema is a definition of the whole's, to which its own references are turned."""
    definitions, kinds = {}, []
    for number, tool in enumerate(tools):
        name = f"parameters{number}"
        definitions[name] = _moved(parameters(tool), f"#/$defs/{name}")
        properties = {"name": {"const": tool.function.name}, "parameters": {"$ref": f"#/$defs/{name}"}}
        kinds.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": kinds}, "$defs": definitions}
    return schema if several else schema | {"maxItems": 1}


def _moved(schema: Any, to: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, to) for key, value in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = to + reference[1:]
    return found
