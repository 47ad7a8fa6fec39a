"""One turn of a chat, and the tools that it may call, as clients write them.

What a whole chat asks for is in :mod:`pd_serve.api.schemas`, the form that a model's template takes in
:mod:`pd_serve.api.conversation`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pd_serve.api.body import Body

# As descriptions say it: the validator below takes more than the field's type.
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}


class Function(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking")


class Message(Body):
    """One turn. ``content`` becomes a string or a list of ``{"type": "text", "text": ...}``."""

    ignored = frozenset({"id", "refusal", "annotations", "provider_specific_fields", "reasoning_details"})
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (), "function_call": ()}

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | list[dict[str, str]] | None, Field(json_schema_extra=_CONTENT)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise pydantic_core.PydanticCustomError("content", "must be a string or a list of text parts")
        texts = [_part_text(part) for part in value]
        return [{"type": "text", "text": text} for text in texts if text is not None]

    @field_validator("reasoning", "reasoning_content", mode="before")
    @classmethod
    def _reasoning(cls, value: Any) -> Any:
        return value if isinstance(value, str) else None  # some send settings under this name

    @field_validator("tool_calls", mode="after")
    @classmethod
    def _calls(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for call in value or ():
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise pydantic_core.PydanticCustomError("tool_calls", "a tool call needs a 'function' with a 'name'")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise pydantic_core.PydanticCustomError("content", "a message needs a 'content' (a string or text parts)")
        return self


def _part_text(part: Any) -> str | None:
    """The text of a part of a message; None for parts that are not said to the model."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict):
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            return str(part["refusal"])
        if kind in _REASONING_PARTS:
            return None
    raise pydantic_core.PydanticCustomError(
        "content",
        "only text parts are supported (these models neither see nor hear), got a part of type '{kind}'",
        {"kind": str(kind)[:40]},
    )


def function_name(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def allowed_tools(choice: Any) -> tuple[str, list[str]] | None:
    """OpenAI's ``{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}``: mode and names; None: it
    is none."""
    allowed = (
        choice.get("allowed_tools") if isinstance(choice, dict) and choice.get("type") == "allowed_tools" else None
    )
    if not isinstance(allowed, dict) or allowed.get("mode") not in ("auto", "required"):
        return None
    tools = allowed.get("tools")
    names = [function_name(tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return (allowed["mode"], names) if names and all(names) else None


def check_continuation(messages: list[Message], generation: bool | None, continuation: bool | None) -> None:
    if not continuation:
        return
    if generation:
        raise pydantic_core.PydanticCustomError(
            "continuation", "'add_generation_prompt' and 'continue_final_message' cannot both be true"
        )
    if messages[-1].content is None:
        raise pydantic_core.PydanticCustomError(
            "continuation", "'continue_final_message' needs a final message that has a content"
        )
