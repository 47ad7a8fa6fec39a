"""Forms of a grammar, each brought into the one that llguidance compiles.

llguidance is an extra: :func:`missing` says what to install where it is not. Called in the process beside the router
or the engine (:mod:`pd_serve.grammar.worker`), because some of it is slow for long texts.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from pd_serve.errors import PDServeError
from pd_serve.grammar.tags import Special, or_calls, structural
from pd_serve.wire.link import Grammar

LOWERED = "lowered"  # the kind of what :func:`lower` has made
NONE_LEFT = "other fields of the request permit none of the tokens that it does"
MAX_TEXT = 128 << 10  # characters of a grammar

# Between the parts of a JSON text: enough for any layout, and an end to what weak models go on with for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
# Alternatives of which exactly one may match are taken as such of which one has to: what pydantic writes for unions
# with a discriminator is the same in both readings.
_JSON: Any = {"whitespace_pattern": _WHITESPACE, "coerce_one_of": True}
# Keywords of a JSON schema with schemas in them.
_OF_NAMES, _OF_LISTS = {"properties", "$defs", "definitions"}, {"anyOf", "oneOf", "prefixItems"}
_OF_ONE = {"items", "additionalProperties", "contains", "not", "if", "then", "else"}
_FURTHER = {"additionalProperties", "unevaluatedProperties", "patternProperties"}


class GrammarError(PDServeError):
    """A grammar that cannot be compiled, and why."""


def missing() -> str:
    """What to do where llguidance is not installed; empty where it is."""
    return "" if find_spec("llguidance") else "structured output needs llguidance: pip install 'pd-serve[structured]'"


def _no_special(text: str) -> int | None:
    return None


def lower(grammar: Grammar, special: Special = _no_special) -> str:
    """What llguidance's matcher takes. Raises GrammarError; what is not found out here is when it is compiled.

    ``special``: the id of a text that is one special token, else None.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    text = grammar.text
    if len(text) > MAX_TEXT:
        raise GrammarError(f"it has {len(text)} characters, and at most {MAX_TEXT} are allowed")
    try:
        match grammar.kind:
            case "lowered":  # LOWERED
                return text
            case "json_object":
                return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON)
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(closed(text), defaults=_JSON)
            case "structural_tag":
                return LLMatcher.grammar_from_lark(structural(text, _inline, special))
            case "or_calls":
                return _or_calls(json.loads(text), special)
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "choice":
                return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_literal, json.loads(text))))
            case "ebnf":
                return LLMatcher.grammar_from_lark(any_to_lark(text))
            case "lark":
                return LLMatcher.grammar_from_lark(text)
    except Exception as error:  # ValueError, RecursionError, and the converter of EBNF has one of its own
        raise GrammarError(one_line(str(error))) from None
    raise GrammarError(f"there is no kind {grammar.kind[:40]!r} of grammar")


def _inline(schema: Any) -> str:
    """As a grammar in Lark's notation has it behind ``%json``."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return closed(json.dumps({**schema, "x-guidance": {**_JSON, **schema.get("x-guidance", {})}}))


def _or_calls(said: dict[str, Any], special: Special) -> str:
    inner = lower(Grammar(said["kind"], said["text"]), special)
    return or_calls(inner, said["openings"], special, spaces=said["spaces"])


def closed(text: str) -> str:
    """Objects whose schema does not speak of further properties have none, as OpenAI's strict schemas and xgrammar do.

    JSON schema would let a model add properties without end, and weak ones do. Not where schemas are joined by
    ``allOf``: each would forbid what the others ask for.
    """
    try:
        return text if '"allOf"' in text else json.dumps(_closed(json.loads(text)))
    except ValueError:
        return text  # whoever compiles it says what is wrong


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _OF_NAMES & found.keys():
        if isinstance(found[key], dict):
            found[key] = {name: _closed(part) for name, part in found[key].items()}
    for key in _OF_LISTS & found.keys():
        if isinstance(found[key], list):
            found[key] = [_closed(part) for part in found[key]]
    for key in _OF_ONE & found.keys():
        found[key] = _closed(found[key])
    if "properties" in found and not _FURTHER & found.keys():
        found["additionalProperties"] = False
    return found


def one_line(message: str) -> str:
    """Of an error of llguidance: without its state, and short enough for an answer."""
    return " ".join(message.partition("<state>")[0].split())[:500]


def _literal(text: Any) -> str:
    return json.dumps(text, ensure_ascii=False)
