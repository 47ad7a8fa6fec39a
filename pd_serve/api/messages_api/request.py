"""A request of the Messages API, checked, and as a chat.

What only concerns caching, billing or places is taken without effect; tools that Anthropic runs or defines, and
everything that is not text, are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pd_serve.api.body import Body, Int
from pd_serve.api.errors import bad_request
from pd_serve.api.leniency import Leniency
from pd_serve.api.messages_api.blocks import messages
from pd_serve.api.messages_api.events import MessageFormat
from pd_serve.api.responses import Usage
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.api.translated import AnsweredRequest, TranslatedRequest

_IGNORED = frozenset(
    {"cache_control", "container", "context_management", "diagnostics", "inference_geo", "speed", "user_profile_id"}
    | {"workspace_id", "betas"}
)


class Thinking(Body):
    ignored = frozenset({"budget_tokens", "display"})

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputConfig(Body):
    format: dict[str, Any] | None = None
    effort: Annotated[str, Field(max_length=64)] | None = None


class CountTokensRequest(TranslatedRequest):
    """What is counted: all of a request but how it is answered."""

    ignored = TranslatedRequest.ignored | _IGNORED
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TranslatedRequest.unsupported,
        "mcp_servers": ([],),
        "max_output_tokens": (),
        "response_format": (),
    }
    advice: ClassVar[dict[str, str]] = {
        "mcp_servers": "call them yourself, as tools",
        "max_output_tokens": "this API has 'max_tokens' instead",
        "response_format": "this API has 'output_config.format' instead",
    }
    names: ClassVar[dict[str, str]] = {
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "stop": "stop_sequences",
    }
    own = frozenset({"messages", "tools", "tool_choice", "max_tokens"})

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None  # the older name of ``output_config.format``
    stop_sequences: list[str] | None = None

    def chat(self, leniency: Leniency) -> ChatCompletionRequest:
        """Without ``max_tokens``: what of it fits is known when the prompt has its tokens."""
        found = messages(self.system, self.messages)
        # As Anthropic's models do, the answer goes on from a last message of the assistant's.
        continued = found[-1]["role"] == "assistant" and bool(found[-1]["content"]) and "tool_calls" not in found[-1]
        config = self.output_config or OutputConfig()
        chosen = self.tool_choice or {}
        single = chosen.get("disable_parallel_tool_use")
        thinking = self.enable_thinking
        if self.thinking is not None:
            thinking = {"disabled": False, "enabled": True}.get(self.thinking.type)  # else as the template has it
        return self.translated(
            leniency,
            messages=found,
            tools=_tools(self.tools),
            tool_choice=_tool_choice(chosen),
            stop=self.stop_sequences or self.stop,
            enable_thinking=thinking,
            reasoning_effort=config.effort,
            response_format=_response_format(config.format or self.output_format),
            **({"parallel_tool_calls": False} if single else {}),
            **({"continue_final_message": True, "add_generation_prompt": False} if continued else {}),
        )


class MessagesRequest(CountTokensRequest, AnsweredRequest):
    max_tokens: Annotated[Int, Field(ge=1)]

    def output_tokens(self, room: int) -> int:
        """Clients have to name a number and name large ones: as Anthropic's, the model says how it ended instead."""
        return min(room, self.max_tokens)

    def make_format(self, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> MessageFormat:
        return MessageFormat(self.max_tokens, id=id, created_s=created_s, model=model, usage=usage)


def _tools(given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    found = []
    for place, tool in enumerate(given or ()):
        kind, where = tool.get("type") or "custom", f"tools.{place}"
        if kind != "custom":
            raise bad_request(
                f"{where}: tools of type '{str(kind)[:40]}' are not supported: describe it as a tool of your own, "
                "with 'name' and 'input_schema', and run it yourself",
                where,
                "unsupported_tool",
            )
        if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
            raise bad_request(f"{where}: a tool needs a 'name' and an 'input_schema'", where, "missing_field")
        kept = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
        found.append({"type": "function", "function": {**kept, "parameters": tool["input_schema"]}})
    return found or None


def _tool_choice(given: dict[str, Any]) -> Any:
    match given.get("type"):
        case None if not given:
            return None
        case "auto" | "none" as kind:
            return kind
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": given.get("name")}}
    raise bad_request("tool_choice.type: must be auto, any, tool or none", "tool_choice.type")


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise bad_request("output_config.format: must be a 'json_schema' with a 'schema'", "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given["schema"], "strict": True}}
