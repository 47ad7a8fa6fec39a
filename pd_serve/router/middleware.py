"""What every HTTP request passes first: its id, the API key where keys are set, and which listener it came to."""

from __future__ import annotations

import hmac
import random
import re
from collections import Counter
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.api.messages_api.errors import MESSAGES, body_at

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# For probes, and what is said in public.
_OPEN = ("/health", "/ready", "/ping", "/version", "/openapi.json", "/docs", "/docs/app.js", "/docs/style.css")
_PROVEN = ("/nodes",)  # nodes hold no client's key and prove the secret instead
_PAGE = ("/dashboard", "/dashboard/app.js", "/dashboard/style.css")  # asks for the key itself; shows nothing without
_ADMIN = ("/metrics", "/v1/status", "/dashboard/events", *_PAGE)
# They run on nodes.
COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations")
_KEY_HEADERS = (b"x-api-key", b"api-key")  # of Anthropic's and Azure's clients


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id where it is usable, else one of ours. Empty outside of :class:`Edge`."""
    return str(scope.get("pd_serve.request_id", ""))


class Admin(NamedTuple):
    """A listener for operators. Where there is one, what is for them is nowhere else."""

    port: int
    needs_key: bool  # others than processes of this machine reach it

    def hides(self, scope: Scope, path: str) -> bool:
        """Whether ``path`` is not for the listener that a request came to."""
        return path in _ADMIN and (scope.get("server") or ("", 0))[1] != self.port


def wants_key(path: str, admin: Admin | None) -> bool:
    """Where keys are set."""
    spared = admin is not None and not admin.needs_key and path in _ADMIN
    return not spared and path not in _OPEN + _PROVEN + _PAGE


class Edge:
    """ASGI middleware. Adds nothing to a stream's chunks but one call. ``at_once``: completions of one key; 0: any."""

    def __init__(
        self, app: ASGIApp, api_keys: AbstractSet[str] = frozenset(), admin: Admin | None = None, at_once: int = 0
    ) -> None:
        self._app = app
        self._admin = admin
        self._keys = [key.encode() for key in api_keys]
        self._at_once = at_once
        self._served: Counter[bytes] = Counter()  # completions, by key

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
        id = given if _ID.fullmatch(given) else b"%016x" % random.getrandbits(64)  # a name, no secret
        scope["pd_serve.request_id"] = id.decode()
        ids = [(b"x-request-id", id)] + [(b"request-id", id)] * scope["path"].startswith(MESSAGES)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        error = self._refusal(scope, keys)
        if error is not None:
            headers = [(b"content-type", b"application/json")]
            headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            headers += [(b"retry-after", b"1")] if error.status == 429 else []
            await send_with_id({"type": "http.response.start", "status": error.status, "headers": headers})
            await send_with_id({"type": "http.response.body", "body": body_at(scope["path"], error, id.decode())})
            return
        key = self._known(keys) if scope["path"] in COMPLETIONS else b""
        self._served[key] += 1
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._served[key] -= 1
            if not self._served[key]:
                del self._served[key]

    def _refusal(self, scope: Scope, keys: list[bytes]) -> APIError | None:
        path, needs_key = scope["path"], bool(self._keys) and wants_key(scope["path"], self._admin)
        if path in _OPEN + _PROVEN:
            return None
        if self._admin is not None and self._admin.hides(scope, path):
            return APIError(404, f"{path} is on the admin listener, not here: --admin-host, --admin-port")
        key = self._known(keys)
        if needs_key and not key:
            return APIError(401, "send a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
        if key and path in COMPLETIONS and 0 < self._at_once <= self._served[key]:
            return APIError(
                429,
                f"{self._at_once} requests of this API key are being served: wait for one of them to end",
                code="too_many_requests",
            )
        return None

    def _known(self, given: list[bytes]) -> bytes:
        """The key of ours that was given, or nothing."""
        # All keys are compared, each in constant time: how long it takes tells nothing.
        found = [known for key in given for known in self._keys if hmac.compare_digest(key, known)]
        return found[0] if found else b""
