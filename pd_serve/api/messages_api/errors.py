"""Errors in Anthropic's shape, for whatever answers below the Messages API's path."""

from __future__ import annotations

import msgspec

from pd_serve.api.errors import APIError

MESSAGES = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def document(error: APIError, request_id: str) -> bytes:
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    found = {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    return msgspec.json.encode(found)


def body_at(path: str, error: APIError, request_id: str) -> bytes:
    """In the shape of the API that the path belongs to."""
    return document(error, request_id) if path.startswith(MESSAGES) else error.body(request_id)
