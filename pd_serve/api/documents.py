"""What answers look like: models for the API's description and for tests, never on the way of an answer.

Answers are written by the modules that make them; tests read them with these models. Fields may be added at any time.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, RootModel

from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", defer_build=True, protected_namespaces=())


class Error(_Document):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None = None


class ErrorDocument(_Document):
    error: Error


class MessagesError(_Document):
    type: str
    message: str


class MessagesErrorDocument(_Document):
    """Anthropic's shape of errors."""

    type: Literal["error"]
    error: MessagesError
    request_id: str


class PromptTokensDetails(_Document):
    cached_tokens: int


class Usage(_Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class _Choice(_Document):
    index: int
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(_Document):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Completion(_Document):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(_Document):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Document):
    content: list[ChatLogprob] | None


class CalledFunction(_Document):
    name: str | None = None
    arguments: str | None = None


class ToolCall(_Document):
    """In a stream: ``index`` says which call a piece belongs to; id and name come with its first."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(_Document):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Document):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Choice):
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(_Document):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Event(_Document):
    """What kind of event it is says what else it holds."""

    type: str


class InvokedEvent(RootModel[ChatCompletionChunk | Completion]):
    """As the request was a chat or a completion."""


class Invocation(RootModel[ChatCompletionRequest | CompletionRequest]):
    """A chat where it has `messages`, else a completion."""


class Invoked(RootModel[ChatCompletion | Completion]):
    """As the request was a chat or a completion."""


class Response(_Document):
    """OpenAI's Response."""

    id: str
    object: Literal["response"]
    created_at: float
    status: str
    model: str
    output: list[dict[str, Any]]


class AnthropicMessage(_Document):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class CountedTokens(_Document):
    input_tokens: int


class Model(_Document):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Document):
    object: Literal["list"]
    data: list[Model]


class Tokens(_Document):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Document):
    prompt: str


class TokenizerInfo(_Document):
    """By the names of tokenizer_config.json."""

    tokenizer_class: str
    model_max_length: int
    chat_template: str | None


class Health(_Document):
    status: Literal["ok"]


class Pong(_Document):
    pass


class Version(_Document):
    version: str


class Readiness(_Document):
    ready: bool
    reason: str | None = None


class Status(_Document):
    version: str
    pid: int
    uptime_s: float
    draining: bool
    in_flight: dict[str, int]
    sequences: int
    models: list[dict[str, Any]]
    nodes: list[dict[str, Any]]


class NodeAdded(_Document):
    url: str
    state: str


class NodeRemoved(_Document):
    url: str
    known: bool


class OpenAPI(_Document):
    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
