"""What every HTTP request passes first: its id, and the API key where keys are set."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Set as AbstractSet

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.errors import APIError

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_OPEN = ("/health", "/ready", "/metrics", "/nodes")  # for probes, scrapers and nodes, which hold no client's key
_KEY_HEADERS = (b"x-api-key", b"api-key")  # of Anthropic's and Azure's clients


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id where it is usable, else one of ours. Empty outside of :class:`Edge`."""
    return str(scope.get("pd_serve.request_id", ""))


class Edge:
    """ASGI middleware. Adds nothing to a stream's chunks but one call."""

    def __init__(self, app: ASGIApp, api_keys: AbstractSet[str] = frozenset()) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = b""
        keys: list[bytes] = []
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given = value
            elif name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() == b"bearer":
                    keys.append(key.strip())
            elif name in _KEY_HEADERS:
                keys.append(value)
        id = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        scope["pd_serve.request_id"] = id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id)]}
            await send(message)

        if self._keys and scope["path"] not in _OPEN and not self._known(keys):
            error = APIError(401, "send a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send_with_id({"type": "http.response.start", "status": 401, "headers": headers})
            await send_with_id({"type": "http.response.body", "body": error.body(id.decode())})
            return
        await self._app(scope, receive, send_with_id)

    def _known(self, given: list[bytes]) -> bool:
        # All keys are compared, each in constant time: how long it takes tells nothing.
        found = [hmac.compare_digest(key, known) for key in given for known in self._keys]
        return any(found)
