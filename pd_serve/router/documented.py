"""A route that FastAPI describes and does not run: handlers read the body and make the answer themselves.

Limits, leniency, errors of our own and parsing beside the loop stay where they are, and a token event passes nothing
of FastAPI. What the handlers take and give is said by models; their schemas are made when somebody first asks.
"""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, request_response
from starlette.types import Scope

from pd_serve import __version__
from pd_serve.api import documents

Handler = Callable[[Request], Coroutine[Any, Any, Any]]
Kind = type[BaseModel]
_Refs = Mapping[tuple[Any, JsonSchemaMode], dict[str, Any]]  # of a model

_JSON = "application/json"
_DONE = "[DONE]"
_SAID = {
    400: "the request is wrong: `message` says what to change",
    401: "no valid API key",
    403: "the order is refused: `message` says why",
    404: "there is no such model here, or no such path",
    408: "the request's body did not come",
    413: "the request's body is too large",
    429: "too many requests: wait as long as `Retry-After` says",
    499: "the client left",
    500: "an error of the server's own",
    501: "what it needs is not installed here",
    502: "nodes failed, and trying again on others did not help",
    503: "no node can take the request now: try again after `Retry-After`",
    504: "the request took longer than the server allows",
}
BODY = (400, 408, 413)  # of whatever reads a body
WORK = (*BODY, 404, 429, 499, 500, 501, 502, 503, 504)  # of whatever runs on nodes


class Documented(APIRoute):
    """``takes``: the body's model. ``gives``: the answer's model, or the media type of one that is not JSON.

    Where it gives None it is always an error. ``streams``: what the events hold that ``"stream": true`` gives, and an
    example of them. ``errors``: statuses that are not a success. ``statuses``: those that the handler makes itself.
    """

    def __init__(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        tag: str,
        gives: Kind | str | None,
        takes: Kind | None = None,
        examples: Mapping[str, Mapping[str, Any]] | None = None,
        streams: tuple[Kind, str] | None = None,
        errors: Iterable[int] = (),
        statuses: Mapping[int, Kind] | None = None,
        parameters: Iterable[dict[str, Any]] = (),
        error: Kind = documents.ErrorDocument,
        listed: bool = True,
    ) -> None:
        self.method = method
        self.takes, self.gives, self.streams, self.error = takes, gives, streams, error
        self.examples = examples or {}
        self.errors = sorted(errors)
        self.statuses = dict(statuses or {})  # answers of the handler's own that are not successes
        self.parameters = list(parameters)
        text = textwrap.dedent(handler.__doc__ or "").strip()
        super().__init__(
            path,
            handler,
            methods=[method],
            tags=[tag],
            summary=text.partition("\n")[0],
            description=text,
            response_model=None,
            include_in_schema=listed,
            operation_id=re.sub(r"\W+", "_", f"{method.lower()}{path.replace(':path', '')}").strip("_"),
        )
        self.app = request_response(handler)  # Starlette's: as it is

    def models(self) -> Iterable[tuple[Kind, JsonSchemaMode]]:
        if self.takes is not None:
            yield self.takes, "validation"
        streamed = self.streams and self.streams[0]
        for kind in (self.gives, self.error, streamed, *self.statuses.values()):
            if kind is not None and not isinstance(kind, str):
                yield kind, "serialization"

    def operation(self, refs: _Refs, *, keys: bool) -> dict[str, Any]:
        """What is said of it beyond FastAPI's own. ``keys``: it wants an API key."""

        def answer(kind: Kind | str, description: str) -> dict[str, Any]:
            if isinstance(kind, str):
                return {"description": description, "content": {kind: {"schema": {"type": "string"}}}}
            return {"description": description, "content": {_JSON: {"schema": refs[kind, "serialization"]}}}

        responses = {} if self.gives is None else {"200": answer(self.gives, "the answer")}
        if self.streams:
            kind, example = self.streams
            held = [refs[kind, "serialization"], refs[self.error, "serialization"]]
            data: dict[str, Any] = {"type": "string", "contentMediaType": _JSON, "contentSchema": {"anyOf": held}}
            if _DONE in example:
                data = {"type": "string", "anyOf": [{"const": _DONE}, data]}
            event = {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}
            responses["200"]["content"]["text/event-stream"] = {"schema": event, "example": example}
        for status in [401] * keys + self.errors:
            responses[str(status)] = answer(self.error, _SAID[status])
        for status, kind in self.statuses.items():
            responses[str(status)] = answer(kind, _SAID[status])
        said: dict[str, Any] = {"responses": responses}
        if self.parameters:
            said["parameters"] = self.parameters
        if self.takes is not None:
            content: dict[str, Any] = {"schema": refs[self.takes, "validation"]}
            if self.examples:
                content["examples"] = {name: {"value": value} for name, value in self.examples.items()}
            said["requestBody"] = {"required": True, "content": {_JSON: content}}
        if keys:
            said["security"] = [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
        return said


def allowed_methods(routes: Iterable[Documented], scope: Scope) -> list[str]:
    """Of the path that a request asked for."""
    methods = {route.method for route in routes if route.matches(scope)[0] != Match.NONE}
    return sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))


class Description:
    """``hidden``: whether a path is not served on the listener that a request came to. ``keyed``, ``strict``: as in
    :func:`schema`."""

    def __init__(
        self,
        tags: Mapping[str, str],
        *,
        keyed: Callable[[str], bool],
        hidden: Callable[[str, Request], bool],
        strict: bool,
    ) -> None:
        self.routes: Sequence[Documented] = ()
        self._tags, self._keyed, self._hidden, self._strict = tags, keyed, hidden, strict
        self._made: dict[tuple[str, ...], bytes] = {}

    async def openapi(self, request: Request) -> Response:
        """This description, as an OpenAPI document"""
        shown = [route for route in self.routes if not self._hidden(route.path, request)]
        which = tuple(route.path for route in shown)
        if which not in self._made:
            made = await asyncio.to_thread(schema, shown, tags=self._tags, keyed=self._keyed, strict=self._strict)
            self._made[which] = msgspec.json.encode(made)
        return Response(self._made[which], media_type=_JSON)


def schema(
    routes: Iterable[Documented], *, tags: Mapping[str, str], keyed: Callable[[str], bool], strict: bool
) -> dict[str, Any]:
    """The OpenAPI document. ``keyed``: whether a path wants an API key. ``strict``: unknown fields are errors."""
    routes = list(routes)
    made = get_openapi(
        title="pd-serve",
        version=__version__,
        summary="Disaggregated prefill/decode serving of large language models",
        routes=routes,
        tags=[{"name": name, "description": said} for name, said in tags.items()],
    )
    wanted = dict.fromkeys(model for route in routes for model in route.models())
    refs, definitions = models_json_schema(list(wanted), ref_template="#/components/schemas/{model}")
    parts = definitions.get("$defs", {})
    if not strict:
        for part in parts.values():
            if part.get("additionalProperties") is False:
                del part["additionalProperties"]
    for route in routes:
        if route.include_in_schema:
            operation = made["paths"][route.path_format][route.method.lower()]
            operation.update(route.operation(refs, keys=keyed(route.path)))
    made["components"] = {"schemas": parts}
    if any(keyed(route.path) for route in routes):
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            **{name: {"type": "apiKey", "in": "header", "name": name} for name in ("x-api-key", "api-key")},
        }
    return made
