"""What a request says of the form of its output, as the wire's :class:`Grammar`.

Of the fields that do (OpenAI's ``response_format``, vLLM's ``structured_outputs`` and its older names) at most one may.
Whether a grammar can be compiled is found out later, off the loop (:mod:`pd_serve.grammar.checker`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from pd_serve.api.errors import bad_request
from pd_serve.wire.link import Grammar


class _Part(BaseModel):
    """Fields that are not known change nothing."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


Schema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(min_length=1)]


class JsonSchema(_Part):
    """``strict`` changes nothing: the output has the schema in any case."""

    name: str | None = None
    schema_: Schema | None = Field(None, alias="schema")


class ResponseFormat(_Part):
    """``schema``: of a ``json_object``, as some clients have it. The last three: of a ``structural_tag``."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(_Part):
    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None  # those that the schema does not speak of are forbidden anyway
    structural_tag: dict[str, Any] | str | None = None


class Fields(Protocol):
    """A request's."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Schema | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None


class Wanted(NamedTuple):
    param: str  # the field that asks for it
    grammar: Grammar


# Options of llguidance. The pattern, too: one that is there, as a default is, goes before the switch.
NO_WHITESPACE: dict[str, Any] = {"whitespace_flexible": False, "whitespace_pattern": ""}


def wanted_grammar(request: Fields) -> Wanted | None:
    """Raises APIError(400) where fields contradict each other."""
    found = list(_named(request))
    if len(found) > 1:
        names = " and ".join(f"'{wanted.param}'" for wanted in found)
        raise bad_request(f"{names} each say what the output has to be: leave one", found[1].param)
    return found[0] if found else None


def json_schema(schema: Any, after: Sequence[int] = (), options: dict[str, Any] | None = None) -> Grammar:
    """``schema``: as JSON has it (an object, or true), or a string of JSON. ``options``: llguidance's, of its text."""
    if options:
        try:
            schema = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        except msgspec.DecodeError:
            return Grammar("json_schema", schema, tuple(after))  # whoever compiles it says what is wrong
        schema = {**(schema if isinstance(schema, dict) else {}), "x-guidance": options}
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar("json_schema", text, tuple(after))


def or_calls(grammar: Grammar, openings: Sequence[str]) -> Grammar:
    """What ``grammar`` permits, or a call, which begins with one of ``openings``; behind reasoning spaces may come."""
    said = {"kind": grammar.kind, "text": grammar.text, "openings": openings, "spaces": bool(grammar.after)}
    return Grammar("or_calls", msgspec.json.encode(said).decode(), grammar.after)


def choice(texts: Sequence[str]) -> Grammar:
    return Grammar("choice", msgspec.json.encode(texts).decode())


def _named(request: Fields) -> Iterator[Wanted]:
    yield from _of_format(request.response_format)
    if request.structured_outputs is not None:
        yield from _of_structured(request.structured_outputs)
    if request.guided_json is not None:
        pattern = request.guided_whitespace_pattern
        options = {"whitespace_pattern": pattern} if pattern else None
        yield Wanted("guided_json", json_schema(request.guided_json, options=options))
    if request.guided_regex is not None:
        yield Wanted("guided_regex", Grammar("regex", request.guided_regex))
    if request.guided_choice is not None:
        yield Wanted("guided_choice", choice(request.guided_choice))
    if request.guided_grammar is not None:
        yield Wanted("guided_grammar", Grammar("ebnf", request.guided_grammar))


def _of_format(wanted: ResponseFormat | None) -> Iterator[Wanted]:
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_object" and wanted.schema_ is not None:
        yield Wanted("response_format", json_schema(wanted.schema_))
    elif wanted.type == "json_object":
        yield Wanted("response_format", Grammar("json_object"))
    elif wanted.type == "structural_tag":
        said = wanted.model_dump(include={"structures", "triggers", "format"}, exclude_none=True)
        yield Wanted("response_format", Grammar("structural_tag", msgspec.json.encode(said).decode()))
    elif wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request(
            'response_format: a \'json_schema\' needs {"name": ..., "schema": {...}}', "response_format.json_schema"
        )
    else:
        yield Wanted("response_format", json_schema(wanted.json_schema.schema_))


def _of_structured(wanted: StructuredOutputs) -> Iterator[Wanted]:
    name = "structured_outputs"
    options: dict[str, Any] = {}
    if wanted.whitespace_pattern:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    if wanted.disable_any_whitespace:
        options |= NO_WHITESPACE
    if wanted.json_ is not None:
        yield Wanted(f"{name}.json", json_schema(wanted.json_, options=options))
    if wanted.json_object:
        yield Wanted(f"{name}.json_object", json_schema({"type": "object"}, options=options))
    if wanted.regex is not None:
        yield Wanted(f"{name}.regex", Grammar("regex", wanted.regex))
    if wanted.choice is not None:
        yield Wanted(f"{name}.choice", choice(wanted.choice))
    if wanted.grammar is not None:
        yield Wanted(f"{name}.grammar", Grammar("ebnf", wanted.grammar))
    if (tag := wanted.structural_tag) is not None:
        text = tag if isinstance(tag, str) else msgspec.json.encode(tag).decode()
        yield Wanted(f"{name}.structural_tag", Grammar("structural_tag", text))
