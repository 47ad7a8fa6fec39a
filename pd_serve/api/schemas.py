"""Request bodies: what is accepted, and a message that says what to change for everything else.

Bytes become one of these models in :mod:`pd_serve.api.parsing`. What they have in common is :mod:`pd_serve.api.body`'s,
turns and tools are :mod:`pd_serve.api.messages`'. Checks that need the model (lengths, vocabulary) are in
:mod:`pd_serve.api.sampling` and :mod:`pd_serve.api.text_model`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import pydantic_core
from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from pd_serve.api import restrictions
from pd_serve.api.body import Body, Int, Ints, Name, wholes
from pd_serve.api.grammars import Choices, ResponseFormat, Schema, StructuredOutputs
from pd_serve.api.messages import Message, Tool, allowed_tools, check_continuation, function_name

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024


_Unit = Annotated[float, Field(ge=0.0, le=1.0)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
_INT64 = 2**63
# As descriptions say it: validators below take more than the field's type.
_STOP = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}


class StreamOptions(Body):
    ignored = frozenset({"include_obfuscation"})

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Body):
    """What both kinds of generation requests share. ``None`` always means the default."""

    model: Name = ""
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=_INT64)] | None = None
    min_p: _Unit | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[Int, Field(ge=-_INT64, lt=2 * _INT64)] | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    stop: Annotated[list[str] | None, Field(json_schema_extra=_STOP)] = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[Int, Field(ge=-_INT64, lt=_INT64)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    bad_words: Annotated[list[str], AfterValidator(restrictions.bad_words)] | None = None
    allowed_token_ids: Annotated[Ints, Field(min_length=1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=restrictions.MAX_SALT_CHARACTERS)] | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @field_validator("seed", mode="after")
    @classmethod
    def _seed(cls, value: int | None) -> int | None:
        return None if value == -1 else value

    @field_validator("truncate_prompt_tokens", mode="after")
    @classmethod
    def _truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise pydantic_core.PydanticCustomError("truncation", "must be at least 1, or -1 for what the model takes")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str) else value
        if items is None:
            return None
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise pydantic_core.PydanticCustomError("stop", "must be a string or a list of strings")
        if len(items) > MAX_STOP_STRINGS:
            raise pydantic_core.PydanticCustomError(
                "stop",
                "at most {limit} stop strings are allowed, got {got}",
                {"limit": MAX_STOP_STRINGS, "got": len(items)},
            )
        if not all(items):
            raise pydantic_core.PydanticCustomError("stop", "a stop string must not be empty")
        if any(len(item) > MAX_STOP_CHARACTERS for item in items):
            raise pydantic_core.PydanticCustomError(
                "stop", "a stop string may have at most {limit} characters", {"limit": MAX_STOP_CHARACTERS}
            )
        return items

    @field_validator("stop_token_ids", mode="after")
    @classmethod
    def _stop_tokens(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(value) > MAX_STOP_TOKENS:
            raise pydantic_core.PydanticCustomError(
                "stop", "at most {limit} stop tokens are allowed", {"limit": MAX_STOP_TOKENS}
            )
        return value

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is None:
            return None
        if len(value) > MAX_LOGIT_BIAS:
            raise pydantic_core.PydanticCustomError(
                "bias", "may have at most {limit} entries", {"limit": MAX_LOGIT_BIAS}
            )
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise pydantic_core.PydanticCustomError(
                    "bias", "keys must be token ids (decimal numbers as strings), got '{key}'", {"key": key[:40]}
                )
            if not -100.0 <= bias <= 100.0:
                raise pydantic_core.PydanticCustomError("bias", "values must be between -100 and 100")
        return value

    @model_validator(mode="after")
    def _stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise pydantic_core.PydanticCustomError("stream", "'stream_options' needs 'stream': true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise pydantic_core.PydanticCustomError(
                "best_of", "'best_of' must be at least 'n': it is how many are made to choose from"
            )
        if self.ranked and self.stream:
            raise pydantic_core.PydanticCustomError(
                "best_of", "'best_of' above 'n' chooses among whole answers: leave out 'stream'"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise pydantic_core.PydanticCustomError(
                "prompt_logprobs", "'prompt_logprobs' come with whole answers only: leave out 'stream'"
            )
        return self

    @property
    def choices(self) -> int:
        """How many are made of each prompt."""
        return self.best_of or self.n or 1

    @property
    def ranked(self) -> bool:
        """Whether more are made than are wanted."""
        return self.choices > (self.n or 1)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Usage so far in every event of a stream."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


_COMMON_IGNORED = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "store", "metadata"}
    | {"request_id", "spaces_between_special_tokens", "parallel_tool_calls", "provider", "reasoning"}
    | {"include_reasoning", "kv_transfer_params", "guided_decoding_backend"}
)
_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    # Names that other servers have for what changes the text.
    "grammar": ("",),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "repeat_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "n_predict": (),
    "num_predict": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "stop_sequences": ([],),
}


class CompletionRequest(GenerationRequest):
    ignored = _COMMON_IGNORED
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {**_COMMON_UNSUPPORTED, "suffix": ("",), "prompt_embeds": ()}

    prompt: Any = Field(json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array"}]})
    max_tokens: Annotated[Int, Field(ge=-1)] | None = None  # -1: as much as the model takes
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if _token_ids(value):
                return value
            found = [wholes(item) for item in wholes(value)]
            if _token_ids(found) or all(isinstance(item, str) or (item and _token_ids(item)) for item in found):
                return found
        if value in ([], None) or (isinstance(value, list) and any(item == [] for item in value)):
            raise pydantic_core.PydanticCustomError("prompt", "must not be empty")
        raise pydantic_core.PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids (whole numbers), or a list of those"
        )

    @field_validator("logprobs", mode="before")
    @classmethod
    def _logprobs(cls, value: Any) -> Any:
        """Chats' spelling: true is the token's own log-probability and one alternative."""
        return (1 if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise pydantic_core.PydanticCustomError(
                "max_tokens", "'max_tokens' must be at least 1 (0 only with 'echo': true)"
            )
        return self


def _token_ids(items: Any) -> bool:
    return isinstance(items, list) and all(type(item) is int for item in items)


class ChatCompletionRequest(GenerationRequest):
    ignored = _COMMON_IGNORED | {"prediction"}
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_COMMON_UNSUPPORTED,
        "audio": (),
        "modalities": (["text"],),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "web_search_options": (),
        "verbosity": ("medium",),
        "moderation": (),
        "echo": (False,),
        "chat_template": (),
        "documents": ([],),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Variables of templates that know them (gpt-oss, Qwen3); others take no notice.
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    enable_thinking: bool | None = None

    @field_validator("max_tokens", "max_completion_tokens", mode="before")
    @classmethod
    def _unlimited(cls, value: Any) -> Any:
        return None if value in (-1, -1.0) else value

    @field_validator("tool_choice", mode="after")
    @classmethod
    def _tool_choice(cls, value: Any) -> Any:
        named = isinstance(value, dict) and value.get("type") == "function" and function_name(value)
        if value not in (None, "auto", "none", "required") and not named and allowed_tools(value) is None:
            raise pydantic_core.PydanticCustomError(
                "tool_choice",
                'must be \'auto\', \'none\', \'required\', {"type": "function", "function": {"name": ...}} or '
                '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
            )
        return value

    @property
    def tool_named(self) -> Tool | None:
        """The one that ``tool_choice`` asks for."""
        if not isinstance(self.tool_choice, dict):
            return None
        name = function_name(self.tool_choice)
        return next((tool for tool in self.tools or () if tool.function.name == name), None)

    @property
    def tools_shown(self) -> list[Tool] | None:
        """Those that the model may call."""
        return None if self.tool_choice == "none" or not self.tools else self.tools

    @property
    def template_variables(self) -> dict[str, Any]:
        thinking = False if self.enable_thinking is None and self.reasoning_effort == "none" else self.enable_thinking
        # DeepSeek's and Granite's templates have the switch under the shorter name.
        named = {"reasoning_effort": self.reasoning_effort, "enable_thinking": thinking, "thinking": thinking}
        found = {name: value for name, value in named.items() if value is not None}
        return {**found, **(self.chat_template_kwargs or {})}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise pydantic_core.PydanticCustomError("top_logprobs", "'top_logprobs' needs 'logprobs': true")
        check_continuation(self.messages, self.add_generation_prompt, self.continue_final_message)
        self._narrow_tools()
        if self.tool_choice == "required" and not self.tools:
            raise pydantic_core.PydanticCustomError("tool_choice", "'tool_choice': 'required' needs 'tools'")
        if isinstance(self.tool_choice, dict) and self.tool_named is None:
            name = function_name(self.tool_choice)[:80]
            raise pydantic_core.PydanticCustomError("tool_choice", _NO_SUCH_TOOL, {"name": name})
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise pydantic_core.PydanticCustomError(
                "max_tokens", "'max_tokens' and 'max_completion_tokens' differ: give one of them"
            )
        return self

    def _narrow_tools(self) -> None:
        """To those that ``allowed_tools`` names: the model hears of no others."""
        if (allowed := allowed_tools(self.tool_choice)) is None:
            return
        self.tool_choice, names = allowed
        known = {tool.function.name: tool for tool in self.tools or ()}
        if missing := [name for name in names if name not in known]:
            raise pydantic_core.PydanticCustomError("tool_choice", _NO_SUCH_TOOL, {"name": missing[0][:80]})
        self.tools = [tool for name, tool in known.items() if name in names]


_NO_SUCH_TOOL = "'tool_choice' names a function that is not among 'tools': '{name}'"


class TokenizeRequest(Body):
    """vLLM's shape: either ``prompt`` or ``messages``."""

    model: Name = ""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise pydantic_core.PydanticCustomError("prompt", "give either 'prompt' or 'messages'")
        if self.messages is not None:
            check_continuation(self.messages, self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(Body):
    model: Name = ""
    tokens: Ints


class NodeRequest(Body):
    """POST and DELETE /nodes."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    instance: Annotated[str, Field(max_length=64)] = ""  # of the node's process; empty where people give the order
