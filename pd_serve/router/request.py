"""What clients ask for: their requests are read, checked and put into tokens; writers do the rest.

Handlers of the API's own paths (see :mod:`pd_serve.router.writer` for how an answer reaches its client).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pd_serve.api import schemas
from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.leniency import Leniency
from pd_serve.api.messages_api.request import CountTokensRequest, MessagesRequest
from pd_serve.api.parsing import parse
from pd_serve.api.responses_api.request import ResponsesRequest
from pd_serve.api.text_model import Prompt, TextModel, unknown_model
from pd_serve.api.translated import AnsweredRequest, MakeFormat
from pd_serve.config import RouterConfig
from pd_serve.http import body_of
from pd_serve.router.choice import parser_names
from pd_serve.router.grammars import Grammars
from pd_serve.router.groups import Group, Registry
from pd_serve.router.metrics import Metrics
from pd_serve.router.middleware import request_id
from pd_serve.router.plain import not_served_error
from pd_serve.router.spans import span_of
from pd_serve.router.stream import Shared
from pd_serve.router.writer import Writer

_INLINE_BYTES = 16 << 10  # longer bodies are tokenised in a thread, so that streams do not pause
_NOT_TEXT = {"input", "queries", "documents", "text_1", "data_1"}  # of embeddings, ranks and scores
_T = TypeVar("_T")


class Requests:
    def __init__(self, registry: Registry, shared: Shared, metrics: Metrics) -> None:
        self._settings = shared.settings
        self._registry = registry
        self._shared = shared
        self._metrics = metrics
        self._leniency = Leniency(strict=shared.settings.strict_fields)
        self._begun_s = shared.clock.now_s()
        self._grammars = Grammars()

    async def completions(self, request: Request) -> Writer:
        """A text that goes on from a prompt"""
        arrived_s, content = await self._received(request)
        return await self._generate(request, schemas.CompletionRequest, content, arrived_s)

    async def chat_completions(self, request: Request) -> Writer:
        """The next message of a chat"""
        arrived_s, content = await self._received(request)
        return await self._generate(request, schemas.ChatCompletionRequest, content, arrived_s)

    async def invocations(self, request: Request) -> Writer:
        """SageMaker's one path: a chat where the body has `messages`, else a completion"""
        arrived_s, content = await self._received(request)
        names = await _off_loop(lambda: _names(content), len(content))
        if names & _NOT_TEXT and not names & {"messages", "prompt"}:
            raise not_served_error(request.scope["path"])
        kind = schemas.ChatCompletionRequest if "messages" in names else schemas.CompletionRequest
        return await self._generate(request, kind, content, arrived_s)

    async def responses(self, request: Request) -> Writer:
        """OpenAI's Responses API"""
        return await self._translated(request, ResponsesRequest)

    async def messages(self, request: Request) -> Writer:
        """Anthropic's Messages API"""
        return await self._translated(request, MessagesRequest)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a Messages request has"""
        content = await body(request, self._settings)

        asked = await _off_loop(lambda: parse(CountTokensRequest, content, self._leniency), len(content))
        chat = await _off_loop(lambda: asked.chat(self._leniency), len(content))
        text = (await self._group(chat.model)).text
        return json_response({"input_tokens": await _off_loop(lambda: text.count_chat(chat), len(content))})

    async def _received(self, request: Request) -> tuple[float, bytes]:
        """When the request came, and its body."""
        arrived_s = self._shared.clock.now_s()
        return arrived_s, await body(request, self._settings)

    async def _generate(
        self,
        request: Request,
        kind: type[schemas.CompletionRequest] | type[schemas.ChatCompletionRequest],
        content: bytes,
        arrived_s: float,
    ) -> Writer:
        parsed = await _off_loop(lambda: parse(kind, content, self._leniency), len(content))
        group = await self._group(parsed.model)
        text = group.text  # of now: a node with another one may link meanwhile

        def prompts_of() -> list[Prompt]:
            if isinstance(parsed, schemas.ChatCompletionRequest):
                return [text.chat_prompt(parsed)]
            return text.completion_prompts(parsed)

        prompts = await _off_loop(prompts_of, len(content))
        return await self._writer(request, parsed, prompts, group, text, arrived_s)

    async def _translated(self, request: Request, kind: type[AnsweredRequest]) -> Writer:
        """As :meth:`_generate`, of an API whose requests are chats in other words."""
        arrived_s, content = await self._received(request)
        asked = await _off_loop(lambda: parse(kind, content, self._leniency), len(content))
        chat = await _off_loop(lambda: asked.chat(self._leniency), len(content))
        group = await self._group(chat.model)
        text = group.text
        try:
            prompt = await _off_loop(lambda: text.chat_prompt(chat), len(content))
            limit = asked.output_tokens(text.info.max_model_len - len(prompt.ids))
            chat.max_tokens = chat.max_tokens if limit is None else limit
            return await self._writer(request, chat, [prompt], group, text, arrived_s, asked.make_format)
        except APIError as error:
            raise asked.in_own_words(error) from None

    async def _writer(
        self,
        request: Request,
        parsed: schemas.CompletionRequest | schemas.ChatCompletionRequest,
        prompts: list[Prompt],
        group: Group,
        text: TextModel,
        arrived_s: float,
        format_of: MakeFormat | None = None,
    ) -> Writer:
        wanted = text.outputs.wanted_grammar(parsed, prompts[0].ids, parser_names(self._settings))
        return Writer(
            request=parsed,
            prompts=prompts,
            group=group,
            text=text,
            shared=self._shared,
            metrics=self._metrics,
            request_id=request_id(request.scope),
            arrived_s=arrived_s,
            format_of=format_of,
            span=span_of(request.scope),
            grammar=None if wanted is None else await self._grammars.lowered(wanted, group, text),
        )

    def close(self) -> None:
        self._grammars.close()

    async def _group(self, name: str) -> Group:
        """The group to serve ``name``, one that has nodes; waits ``node_wait_s`` for it where one may be about to come.

        That is so while no node was ever linked, for as long after this router's start, and where nodes of the model
        were here before. Raises APIError: 404 for a model that is not served, 503 where no node came.
        """
        wait_s = self._settings.node_wait_s
        deadline_s = self._shared.clock.now_s() + wait_s
        while True:
            group = self._find(name)
            if group is not None:
                return group
            names, now_s = self._registry.names(), self._shared.clock.now_s()
            until_s = deadline_s if not self._registry.seen or name in ("", *names) else self._begun_s + wait_s
            if self._shared.draining or now_s >= until_s:
                break
            await self._a_node(until_s - now_s)
        if names and name and name not in names:
            raise unknown_model(name, names)
        raise APIError(
            503,
            f"no node serves the model '{name[:200]}' now: start one, or try again later"
            if name
            else "no node is linked to this router: start nodes, or try again later",
            code="no_nodes",
            retry_after_s=wait_s,
        )

    def _find(self, name: str) -> Group | None:
        if not name:
            served = [known for known in self._registry.names() if self._registry.find(known) is not None]
            if len(served) > 1:
                raise bad_request(f"several models are served: name one of {', '.join(served)} in 'model'", "model")
            name = served[0] if served else ""
        return self._registry.find(name)

    async def _a_node(self, timeout_s: float) -> None:
        """Returns when a node was linked, or after that time."""
        came = asyncio.Event()
        self._registry.watchers.add(came.set)
        try:
            async with asyncio.timeout(timeout_s):
                await came.wait()
        except TimeoutError:
            pass
        finally:
            self._registry.watchers.discard(came.set)

    async def tokenize(self, request: Request) -> Response:
        """A text or a chat as the model's tokens"""
        content = await body(request, self._settings)

        parsed = await _off_loop(lambda: parse(schemas.TokenizeRequest, content, self._leniency), len(content))
        text = (await self._group(parsed.model)).text

        def work() -> dict[str, object]:
            ids = text.tokenize(parsed)
            strings = [text.tokenizer.token(id) for id in ids] if parsed.return_token_strs else None
            return {
                "count": len(ids),
                "max_model_len": text.info.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }

        return json_response(await _off_loop(work, len(content)))

    async def detokenize(self, request: Request) -> Response:
        """Tokens as text"""
        content = await body(request, self._settings)

        parsed = await _off_loop(lambda: parse(schemas.DetokenizeRequest, content, self._leniency), len(content))
        text = (await self._group(parsed.model)).text

        def work() -> dict[str, object]:
            if parsed.tokens:
                text.check_ids(parsed.tokens, "tokens")
            return {"prompt": text.tokenizer.decode(parsed.tokens, skip_special_tokens=False)}

        return json_response(await _off_loop(work, len(content)))

    async def tokenizer_info(self, request: Request) -> Response:
        """Special tokens and chat template of a model"""
        group = await self._group(request.query_params.get("model", ""))
        return json_response(group.text.tokenizer_info())


async def body(request: Request, settings: RouterConfig) -> bytes:
    """Raises APIError(413) as soon as the limit is passed; never holds more than the limit."""
    limit = settings.max_body_bytes
    too_large = APIError(
        413, f"the request body is larger than {limit} bytes: send less at once", code="body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > limit:
        raise too_large
    whole = body_of(request.scope)
    if whole is not None:
        if len(whole) > limit:
            raise too_large
        return whole
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.request_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise APIError(
            408, f"the request's body was not here after {settings.request_timeout_s:g} s: send it faster"
        ) from None
    except ClientDisconnect:
        raise APIError(499, "the client left while it sent the request") from None
    return b"".join(parts)


def _names(content: bytes) -> AbstractSet[str]:
    """The fields of a body; none where it is no object: whoever reads it says what is wrong."""
    try:
        return msgspec.json.decode(content, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return set()


async def _off_loop(work: Callable[[], _T], size_bytes: int) -> _T:
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)


def json_response(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")
