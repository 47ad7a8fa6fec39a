"""A request of the Responses API, checked, and as a chat.

What would change the answer and cannot be had (stored conversations, hosted tools, background) is an error that says
what to do instead; what only concerns storage or billing is taken without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pd_serve.api.body import Body, Int
from pd_serve.api.errors import bad_request
from pd_serve.api.leniency import Leniency
from pd_serve.api.responses import Usage
from pd_serve.api.responses_api.events import ResponsesFormat
from pd_serve.api.responses_api.items import messages
from pd_serve.api.schemas import MAX_LOGPROBS, ChatCompletionRequest
from pd_serve.api.translated import AnsweredRequest, TranslatedRequest

_LOGPROBS = "message.output_text.logprobs"
_NOT_STORED = "responses are not stored here: send the whole conversation as 'input'"
_ADVICE = {
    "previous_response_id": _NOT_STORED,
    "conversation": _NOT_STORED,
    "prompt": "prompt templates are not stored here: send 'instructions' and 'input'",
    "background": "responses are not stored here, so none can be fetched later: leave it out and stream",
    "truncation": "leave out the oldest items of 'input' yourself",
    "stop_sequences": "use 'stop'",
    "max_tokens": "this API has 'max_output_tokens' instead",
    "max_completion_tokens": "this API has 'max_output_tokens' instead",
    "response_format": "this API has 'text.format' instead",
    "reasoning_effort": "this API has 'reasoning.effort' instead",
}


class TextSettings(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(Body):
    ignored = frozenset({"summary", "generate_summary", "context", "mode"})

    effort: Annotated[str, Field(max_length=64)] | None = None


class ResponsesRequest(AnsweredRequest):
    ignored = TranslatedRequest.ignored | {"max_tool_calls", "prompt_cache_options", "context_management"}
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TranslatedRequest.unsupported,
        **dict.fromkeys(_ADVICE, ()),
        "background": (False,),
        "truncation": ("disabled",),
        "moderation": (),
    }
    advice = _ADVICE
    own = frozenset({"tools", "tool_choice", "top_logprobs"})
    names: ClassVar[dict[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "verbosity": "text.verbosity",
    }

    input: str | list[Any]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, Any] | None = None

    def chat(self, leniency: Leniency) -> ChatCompletionRequest:
        text = self.text or TextSettings()
        wants_logprobs = bool(self.top_logprobs) or _LOGPROBS in (self.include or ())
        tools, choice = _tools(self.tools, self.tool_choice)
        return self.translated(
            leniency,
            messages=messages(self.instructions, self.input),
            tools=tools,
            tool_choice=choice,
            max_completion_tokens=self.max_output_tokens,
            response_format=_response_format(text.format),
            verbosity=text.verbosity,
            reasoning_effort=self.reasoning and self.reasoning.effort,
            logprobs=True if wants_logprobs else None,
            top_logprobs=self.top_logprobs or None,
        )

    def make_format(self, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> ResponsesFormat:
        return ResponsesFormat(self._echo(), id=id, created_s=created_s, model=model, usage=usage)

    def _echo(self) -> dict[str, Any]:
        """What an answer repeats of its request."""
        text = self.text or TextSettings()
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {"effort": self.reasoning and self.reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity or "medium"},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
        }


def _tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]] | None, Any]:
    """A chat's ``tools`` and ``tool_choice``."""
    found: list[dict[str, Any]] = []
    for place, tool in enumerate(tools or ()):
        kind, where = str(tool.get("type"))[:40], f"tools.{place}"
        if kind != "function":
            raise bad_request(
                f"{where}: tools of type '{kind}' are not supported, nothing runs tools here: give a tool of type "
                "'function', and run it yourself",
                where,
                "unsupported_tool",
            )
        if not isinstance(tool.get("name"), str):
            raise bad_request(f"{where}.name: a function needs a 'name'", f"{where}.name", "missing_field")
        kept = {
            name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
        }
        found.append({"type": "function", "function": kept})
    if isinstance(choice, dict):
        kind = str(choice.get("type"))[:40]
        if kind == "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
                raise bad_request("tool_choice.tools: must be a list of tools", "tool_choice.tools", "invalid_value")
            names = [tool.get("name") for tool in allowed]
            found = [tool for tool in found if tool["function"]["name"] in names]
            choice = choice.get("mode") or "auto"
        elif kind == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        else:
            raise bad_request(f"tool_choice: the type '{kind}' is not supported here", "tool_choice", "invalid_value")
    return found or None, choice


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") == "text":
        return None
    if given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: given[name] for name in given.keys() - {"type"}}}
    return given
