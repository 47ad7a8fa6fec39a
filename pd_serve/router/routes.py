"""Every path that the router serves, in one place, with what its description says. New paths are added here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pd_serve.api import documents, schemas
from pd_serve.api.messages_api.request import CountTokensRequest, MessagesRequest
from pd_serve.api.responses_api.request import ResponsesRequest
from pd_serve.router import plain
from pd_serve.router.dashboard.page import FILES
from pd_serve.router.documented import BODY, WORK, Description, Documented
from pd_serve.router.explorer import page as explorer

if TYPE_CHECKING:
    from pd_serve.router.app import Router

_COMPLETIONS, _MODELS, _TOKENS, _STATE, _NODES = "completions", "models", "tokens", "state", "nodes"
TAGS = {
    _COMPLETIONS: "Text from models: OpenAI's APIs and Anthropic's, whole or as server-sent events",
    _MODELS: "Which models are served",
    _TOKENS: "Text to tokens and back",
    _STATE: "For operators: health, metrics, the state of nodes",
    _NODES: "For nodes: they register and leave",
}
_HELLO = {"role": "user", "content": "Say hello."}
_SHORT = {"max_tokens": 16, "temperature": 0}
_CHUNK = '{"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "tiny", "choices": '
_CHAT_EVENTS = (
    f'data: {_CHUNK}[{{"index": 0, "delta": {{"role": "assistant", "content": ""}}, "finish_reason": null}}]}}\n\n'
    f'data: {_CHUNK}[{{"index": 0, "delta": {{"content": "Hello"}}, "finish_reason": null}}]}}\n\n'
    f'data: {_CHUNK}[{{"index": 0, "delta": {{"content": "."}}, "finish_reason": "stop"}}]}}\n\n'
    "data: [DONE]\n\n"
)
_COMPLETION_EVENTS = (
    'data: {"id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "tiny", "choices": '
    '[{"index": 0, "text": " hello", "logprobs": null, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)
_RESPONSE_EVENTS = (
    'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "sequence_number": 4, '
    '"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": "Hello", "logprobs": []}\n\n'
)
_MESSAGE_EVENTS = (
    'event: content_block_delta\ndata: {"type": "content_block_delta", "index": 0, '
    '"delta": {"type": "text_delta", "text": "Hello"}}\n\n'
)
_OTHERS = (
    *("/v1/embeddings", "/embeddings", "/pooling", "/classify"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
_EXAMPLES: dict[str, dict[str, Any]] = {
    "completions": {
        "text": {"prompt": "The capital of France is", **_SHORT},
        "streamed": {"prompt": "The capital of France is", **_SHORT, "stream": True},
    },
    "chat": {
        "question": {"messages": [_HELLO], **_SHORT},
        "streamed": {
            "messages": [{"role": "system", "content": "Be brief."}, _HELLO],
            **_SHORT,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    "responses": {"question": {"input": "Say hello.", "max_output_tokens": 16}},
    "messages": {"question": {"messages": [_HELLO], "max_tokens": 16}},
    "count": {"question": {"messages": [_HELLO]}},
    "tokenize": {"text": {"prompt": "The capital of France is"}, "chat": {"messages": [_HELLO]}},
    "detokenize": {"tokens": {"tokens": [1, 2, 3]}},
    "node": {"node": {"url": "http://10.0.0.2:8100"}},
}


def routes(router: Router, description: Description) -> list[Documented]:
    return [
        *_answers(router),
        *(Documented("POST", path, plain.not_served, tag=_COMPLETIONS, gives=None, errors=(404,)) for path in _OTHERS),
        *_questions(router),
        *_state(router),
        *_nodes(router),
        Documented("GET", "/openapi.json", description.openapi, tag=_STATE, gives=documents.OpenAPI, errors=(500,)),
        *(
            Documented("GET", path, explorer.file, tag=_STATE, gives=kind, listed=path == "/docs")
            for path, (_, kind) in explorer.FILES.items()
        ),
    ]


def _answers(router: Router) -> list[Documented]:
    """What runs on nodes."""
    requests = router.requests
    documented = functools.partial(Documented, "POST", tag=_COMPLETIONS, errors=WORK)
    return [
        documented(
            "/v1/completions",
            requests.completions,
            takes=schemas.CompletionRequest,
            gives=documents.Completion,
            examples=_EXAMPLES["completions"],
            streams=(documents.Completion, _COMPLETION_EVENTS),
        ),
        documented(
            "/v1/chat/completions",
            requests.chat_completions,
            takes=schemas.ChatCompletionRequest,
            gives=documents.ChatCompletion,
            examples=_EXAMPLES["chat"],
            streams=(documents.ChatCompletionChunk, _CHAT_EVENTS),
        ),
        documented(
            "/v1/responses",
            requests.responses,
            takes=ResponsesRequest,
            gives=documents.Response,
            examples=_EXAMPLES["responses"],
            streams=(documents.Event, _RESPONSE_EVENTS),
        ),
        documented(
            "/v1/messages",
            requests.messages,
            takes=MessagesRequest,
            gives=documents.AnthropicMessage,
            examples=_EXAMPLES["messages"],
            streams=(documents.Event, _MESSAGE_EVENTS),
            error=documents.MessagesErrorDocument,
        ),
        documented(
            "/invocations",
            requests.invocations,
            takes=documents.Invocation,
            gives=documents.Invoked,
            examples=_EXAMPLES["chat"] | _EXAMPLES["completions"],
            streams=(documents.InvokedEvent, _CHAT_EVENTS),
        ),
    ]


def _questions(router: Router) -> list[Documented]:
    """What clients ask and the router answers by itself."""
    requests = router.requests
    of_model = (*BODY, 404, 500, 503)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "may have /"}
    model = {"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}
    return [
        Documented(
            "POST",
            "/v1/messages/count_tokens",
            requests.count_tokens,
            tag=_TOKENS,
            takes=CountTokensRequest,
            gives=documents.CountedTokens,
            examples=_EXAMPLES["count"],
            errors=of_model,
            error=documents.MessagesErrorDocument,
        ),
        Documented(
            "POST",
            "/tokenize",
            requests.tokenize,
            tag=_TOKENS,
            takes=schemas.TokenizeRequest,
            gives=documents.Tokens,
            examples=_EXAMPLES["tokenize"],
            errors=of_model,
        ),
        Documented(
            "POST",
            "/detokenize",
            requests.detokenize,
            tag=_TOKENS,
            takes=schemas.DetokenizeRequest,
            gives=documents.Text,
            examples=_EXAMPLES["detokenize"],
            errors=of_model,
        ),
        Documented(
            "GET",
            "/tokenizer_info",
            requests.tokenizer_info,
            tag=_TOKENS,
            gives=documents.TokenizerInfo,
            parameters=[model],
            errors=(400, 404, 500, 503),
        ),
        Documented("GET", "/v1/models", router.models, tag=_MODELS, gives=documents.ModelList, errors=(500,)),
        Documented(
            "GET",
            "/v1/models/{name:path}",
            router.model,
            tag=_MODELS,
            gives=documents.Model,
            parameters=[name],
            errors=(404, 500),
        ),
    ]


def _state(router: Router) -> list[Documented]:
    page, *files = FILES
    return [
        Documented("GET", "/health", plain.health, tag=_STATE, gives=documents.Health),
        Documented("GET", "/ping", plain.ping, tag=_STATE, gives=documents.Pong),
        Documented("POST", "/ping", plain.ping, tag=_STATE, gives=documents.Pong, listed=False),
        Documented("GET", "/version", plain.version, tag=_STATE, gives=documents.Version),
        Documented(
            "GET",
            "/ready",
            router.ready,
            tag=_STATE,
            gives=documents.Readiness,
            statuses={503: documents.Readiness},
            errors=(500,),
        ),
        Documented("GET", "/metrics", router.metrics_text, tag=_STATE, gives="text/plain", errors=(500,)),
        Documented("GET", "/v1/status", router.status, tag=_STATE, gives=documents.Status, errors=(500,)),
        Documented("GET", f"/dashboard{page}", router.dashboard.file, tag=_STATE, gives="text/html"),
        *(
            Documented("GET", f"/dashboard{file}", router.dashboard.file, tag=_STATE, gives="text/html", listed=False)
            for file in files
        ),
        Documented(
            "GET",
            "/dashboard/events",
            router.dashboard.events,
            tag=_STATE,
            gives="text/event-stream",
            errors=(429, 500),
        ),
    ]


def _nodes(router: Router) -> list[Documented]:
    return [
        Documented(
            method,
            "/nodes",
            handler,
            tag=_NODES,
            takes=schemas.NodeRequest,
            gives=gives,
            examples=_EXAMPLES["node"],
            errors=(*BODY, 401, 403, 500, 503),
        )
        for method, handler, gives in (
            ("POST", router.add_node, documents.NodeAdded),
            ("DELETE", router.remove_node, documents.NodeRemoved),
        )
    ]
