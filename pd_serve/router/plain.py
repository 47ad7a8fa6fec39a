"""What the router answers whatever state it is in, and what it says of endpoints that no model here serves."""

from __future__ import annotations

from collections.abc import Set

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pd_serve import __version__
from pd_serve.api.errors import APIError

_VERSION = msgspec.json.encode({"version": __version__})


async def health(_: Request) -> Response:
    """200 while the process lives"""
    return Response(b'{"status":"ok"}', media_type="application/json")


async def ping(_: Request) -> Response:
    """As `/health`, where SageMaker asks for it"""
    return Response(b"{}", media_type="application/json")


async def version(_: Request) -> Response:
    """The version of pd-serve"""
    return Response(_VERSION, media_type="application/json")


async def not_served(request: Request) -> Response:
    """404: models here make text, not vectors or scores

    Embeddings, scores, ranks and classes need models that this server does not run.
    """
    raise not_served_error(request.scope["path"])


def not_served_error(path: str) -> APIError:
    message = f"no model for {path} is served here: models of pd-serve make text alone, no embeddings or scores"
    return APIError(404, message, code="model_not_found")


def nowhere(path: str, known: Set[str]) -> str:
    """What a path that does not exist is told: base URLs with a ``/v1`` too few or too many are most of them."""
    if "/v1" + path in known:
        return f"there is no {path} here, but /v1{path}: the base URL of OpenAI's clients ends in /v1"
    if path.startswith("/v1/v1/") and path[3:] in known:
        return f"there is no {path} here, but {path[3:]}: leave /v1 out of the base URL"
    if path.startswith("/v1/responses/"):
        return f"there is no {path} here: responses are not stored"
    return f"there is no {path} here: /docs lists what there is"
