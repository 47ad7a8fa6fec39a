"""Text in which some parts have a form, as grammars in Lark's notation: structural tags, and answers that may be calls.

Structural tags are vLLM's and xgrammar's: ``{"structures": [...], "triggers": [...]}``, or ``{"format": {...}}``, and
these are made of others. Called by :mod:`pd_serve.grammar.forms` in the grammar process; ``special`` there tells
the id of a text that is one special token, which grammars have to name by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pd_serve.errors import PDServeError

Special = Callable[[str], int | None]

_ANY = r"/(.|\n)*/"
_PIECES = re.compile(r"(<[^<>\s]+>|\[[A-Z_/]+\])")  # what special tokens look like
_MAX_DEPTH = 16
KNOWN = "const_string, json_schema, regex, any_text, sequence, or, tag, triggered_tags"


class TagError(PDServeError):
    """A structural tag that is none."""


def or_calls(inner: str, openings: list[str], special: Special, *, spaces: bool) -> str:
    """``inner``, as llguidance has it, or what begins with one of ``openings`` and is free from there on.

    ``spaces``: whether there may be some in front, as models write them behind their reasoning.
    """
    grammars = json.loads(inner)["grammars"] if inner.startswith('{"grammars"') else [{"lark_grammar": inner}]
    grammars[0] = {**grammars[0], "name": "format"}
    opens = " | ".join(f"({_literal(opening, special)} <[*]>*)" for opening in openings)
    start = f"start: {'SPACES? ' if spaces else ''}(@format | {opens})\nSPACES: /[ \\n]{{1,4}}/\n"
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": start}, *grammars]})


def structural(text: str, schema: Callable[[Any], str], special: Special) -> str:
    """In Lark's notation. ``schema``: a JSON schema as what ``%json`` takes. Raises TagError."""
    found = _object(json.loads(text), "a structural tag")
    if "format" in found:
        wanted = found["format"]
    elif "structures" in found:
        tags = [
            {"begin": part.get("begin"), "content": {"type": "json_schema", "json_schema": part.get("schema", True)}}
            | {"end": part.get("end", "")}
            for part in (_object(part, "one of 'structures'") for part in _list(found, "structures"))
        ]
        wanted = {"type": "triggered_tags", "triggers": found.get("triggers"), "tags": tags}
    else:
        raise TagError("a structural tag needs a 'format', or 'structures' and 'triggers'")
    made = _Rules(schema, special)
    made.lines.insert(0, f"start: {made.form(wanted, '', 0)}")
    return "\n".join(["%llguidance {}", *made.lines, f"ANY: {_ANY}", ""])


class _Rules:
    """``lines``: rules that expressions name."""

    def __init__(self, schema: Callable[[Any], str], special: Special) -> None:
        self.lines: list[str] = []
        self._schema = schema
        self._special = special

    def form(self, wanted: Any, end: str, depth: int) -> str:
        """An expression for a format and the literal ``end`` behind it."""
        if depth > _MAX_DEPTH:
            raise TagError(f"formats are more than {_MAX_DEPTH} deep")
        found = _object(wanted, "a format")
        behind = _literal(end, self._special)
        match found.get("type"):
            case "const_string":
                return f"{_literal(_text(found, 'value'), self._special)} {behind}"
            case "json_schema":
                return f"%json {self._schema(found.get('json_schema', True))} {behind}"
            case "regex":
                pattern = re.sub(r"(?<!\\)/", r"\/", _text(found, "pattern"))
                return f"{self._rule(f'/{pattern}/', terminal=True)} {behind}"
            case "any_text":
                return self._until(end)
            case "sequence":
                return f"{' '.join(self._each(found, 'elements', depth))} {behind}"
            case "or":
                return f"({' | '.join(self._each(found, 'elements', depth))}) {behind}"
            case "tag":
                return f"{self._tag(found, '', depth)} {behind}"
            case "triggered_tags":
                return f"{self._triggered(found, depth)} {behind}"
        raise TagError(f"a format has one of these types: {KNOWN}; not {str(found.get('type'))[:40]!r}")

    def _each(self, found: dict[str, Any], name: str, depth: int) -> list[str]:
        return [self._rule(self.form(part, "", depth + 1)) for part in _list(found, name)]

    def _tag(self, found: dict[str, Any], trigger: str, depth: int) -> str:
        """Without its ``trigger``, which is there already."""
        begin = _literal(_text(found, "begin")[len(trigger) :], self._special)
        end = found.get("end", "")
        if not isinstance(end, str):
            raise TagError("a tag's 'end' is a string")
        return self._rule(f"{begin} {self.form(found.get('content'), end, depth + 1)}")

    def _triggered(self, found: dict[str, Any], depth: int) -> str:
        """Free text, in which whatever begins with a trigger is one of the tags."""
        triggers = _list(found, "triggers")
        by_trigger: dict[str, list[str]] = {}
        for tag in (_object(tag, "one of 'tags'") for tag in _list(found, "tags")):
            begin = _text(tag, "begin")
            trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
            if trigger is None:
                raise TagError(f"the tag that begins with {begin[:80]!r} begins with none of the 'triggers'")
            by_trigger.setdefault(trigger, []).append(self._tag(tag, trigger, depth))
        kinds = [self._rule(f"{self._until(trigger)} ({' | '.join(tags)})") for trigger, tags in by_trigger.items()]
        one = f"({' | '.join(kinds)})"
        if found.get("stop_after_first"):
            return one if found.get("at_least_one") else f"({one} | ANY)"
        return f"{one}{'+' if found.get('at_least_one') else '*'} ANY"

    def _until(self, end: str) -> str:
        """Any text up to the first ``end``, and that; empty: all that comes."""
        if not end:
            return "ANY"
        if (id := self._special(end)) is not None:
            return f"ANY <[{id}]>"
        return self._rule(f"ANY {json.dumps(end)}", lazy=True)

    def _rule(self, expression: str, *, terminal: bool = False, lazy: bool = False) -> str:
        name = f"{'T' if terminal else 'r'}{len(self.lines)}"
        self.lines.append(f"{name}{'[lazy]' if lazy else ''}: {expression}")
        return name


def _literal(text: str, special: Special) -> str:
    """Special tokens in it by their ids, the rest as text; empty for no text."""
    if (id := special(text)) is not None:
        return f"<[{id}]>"
    parts = [part for part in _PIECES.split(text) if part]
    ids = [special(part) for part in parts]
    if not any(id is not None for id in ids):
        return json.dumps(text) if text else ""
    return " ".join(json.dumps(part) if id is None else f"<[{id}]>" for part, id in zip(parts, ids, strict=True))


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TagError(f"{what} is an object")
    return value


def _list(found: dict[str, Any], name: str) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list) or not value:
        raise TagError(f"'{name}' is a list of at least one")
    return value


def _text(found: dict[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value:
        raise TagError(f"'{name}' is a string of at least one character")
    return value
