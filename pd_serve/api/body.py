"""What every request body has in common: unknown, ignored and unsupported fields, and numbers as clients write them.

Fields that cannot change the text, and those that nobody here knows, are accepted without effect and logged once each
(:mod:`pd_serve.api.leniency`); fields that would change the answer and are not supported are errors, because an answer
that silently ignores them would be wrong. Requests themselves are in :mod:`pd_serve.api.schemas`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

from pd_serve.api.leniency import Leniency, nearest


def _whole(value: Any) -> Any:
    """JavaScript's and spreadsheets' 8.0 is 8."""
    return int(value) if type(value) is float and value.is_integer() else value


def wholes(values: Any) -> Any:
    if isinstance(values, list) and any(type(value) is float for value in values):
        return [_whole(value) for value in values]
    return values


Int = Annotated[int, BeforeValidator(_whole)]
Ints = Annotated[list[int], BeforeValidator(wholes)]
Name = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # OpenAI's and vLLM's fields that have no effect on the text: accepted, ignored.
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Fields that would change the answer: only the values listed (those without effect) are accepted.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # What to do instead.
    advice: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any, info: ValidationInfo) -> Any:
        if not isinstance(body, dict):
            raise pydantic_core.PydanticCustomError("model_type", "must be a JSON object")
        leniency = info.context if isinstance(info.context, Leniency) else _STRICT
        known, kept = cls.model_fields, {}
        for name, value in body.items():
            if name in known and name not in cls.unsupported:
                kept[name] = value
            elif name in cls.unsupported:
                if value is not None and value not in cls.unsupported[name]:
                    advice = (_ADVICE | cls.advice).get(name, "remove it from the request")
                    raise pydantic_core.PydanticCustomError(
                        "unsupported", _UNSUPPORTED, {"field": name, "advice": advice}
                    )
            elif name in cls.ignored:
                leniency.without_effect(name)
            elif leniency.strict:
                hint = nearest(name, [*cls.model_fields, *cls.ignored])
                raise pydantic_core.PydanticCustomError("unknown", _UNKNOWN, {"field": name[:80], "hint": hint})
            else:
                leniency.unknown(name, [*cls.model_fields, *cls.ignored])
        return kept


_STRICT = Leniency(strict=True)
_UNSUPPORTED = "'{field}' is not supported with this value: {advice}"
_UNKNOWN = "unknown field '{field}'{hint}: remove it from the request or correct its name"
_ADVICE = {
    "grammar": "use 'structured_outputs'",
    "json_schema": "use 'structured_outputs'",
    "regex": "use 'structured_outputs'",
    "ebnf": "use 'structured_outputs'",
    "suffix": "this server does not fill in text; put what follows into the prompt",
    "chat_template": "it is chosen where nodes are started; use 'chat_template_kwargs' for its variables",
    "functions": "send them as 'tools'",
    "function_call": "send calls as 'tool_calls', and the choice as 'tool_choice'",
    "repeat_penalty": "use 'repetition_penalty'",
    "n_predict": "use 'max_tokens'",
    "num_predict": "use 'max_tokens'",
    "max_new_tokens": "use 'max_tokens'",
    "max_output_tokens": "use 'max_tokens'",
    "stop_sequences": "use 'stop'",
}
