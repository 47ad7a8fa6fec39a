"""Bytes to request models. Every failure is an APIError(400) whose message says what to change."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import pydantic_core
from pydantic import ValidationError

from pd_serve.api.body import Body
from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.leniency import Leniency

_B = TypeVar("_B", bound=Body)

_QUOTED = re.compile(r"'(\w+)'")
_TOO_DEEP = "the request body is nested too deeply: at most 200 levels are read"


def parse(kind: type[_B], body: bytes, leniency: Leniency | None = None) -> _B:
    """Without ``leniency`` unknown fields are errors.

    Raises APIError(400) whose message names the field, what is wrong and what to change."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the request body is not valid UTF-8 (byte {error.start}): encode it as UTF-8") from None
    try:
        # NaN and Infinity are read so that the message can name the field instead of a column.
        document = pydantic_core.from_json(text, allow_inf_nan=True, cache_strings="keys")
    except ValueError as error:
        if "recursion" in str(error):
            raise bad_request(_TOO_DEEP, code="invalid_json") from None
        raise bad_request(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    return checked(kind, document, leniency)


def checked(kind: type[_B], document: Any, leniency: Leniency | None = None) -> _B:
    """Of what was read already. Raises as :func:`parse` does."""
    try:
        return kind.model_validate(document, context=leniency)
    except ValidationError as error:
        raise _explain(error, kind) from None
    except RecursionError:
        raise bad_request(_TOO_DEEP, code="invalid_json") from None


def _explain(error: ValidationError, kind: type[Body]) -> APIError:
    first = error.errors(include_url=False, include_context=True)[0]
    place = ".".join(str(part) for part in first["loc"]) or None
    message = first["msg"]
    if first["type"] in ("unknown", "unsupported"):
        context = first.get("ctx", {})
        param = f"{place}.{context['field']}" if place else str(context["field"])
        return bad_request(f"{place}: {message}" if place else message, param, f"{first['type']}_field")
    if first["type"] == "missing":
        return bad_request(f"the field '{place}' is required", place, "missing_field")
    if first["type"] == "finite_number":
        message = "must be a finite number"
    elif first["type"] == "model_type":  # pydantic's own names our classes
        message = "must be a JSON object" if place else "the request body must be a JSON object"
    if place is None:  # fields that contradict each other: the first that is named
        named = _QUOTED.search(message)
        return bad_request(message, named[1] if named and named[1] in kind.model_fields else None, "invalid_value")
    return bad_request(f"{place}: {message}", place, "invalid_value")
