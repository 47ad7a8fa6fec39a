"""A link's WebSocket on the node's side: uvicorn's, which takes little from who has not proved itself yet.

Used by the node's server, ``uvicorn.Config(ws=LinkProtocol)``; :mod:`pd_serve.node.links` says when a router is proved.
It relies on these parts of uvicorn's ``WebSocketsSansIOProtocol``, which tests/node/test_websocket.py looks for:
``conn``, ``scope``, ``transport``, ``close_sent``, ``handle_connect``.
"""

from __future__ import annotations

from typing import Any

from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode
from websockets.http11 import Request

MAX_UNPROVED_BYTES = 64 << 10  # a greeting and a proof are far shorter; what is proved is bounded by MAX_FRAME_BYTES
_PROVED = "pd_serve.proved"


class LinkProtocol(WebSocketsSansIOProtocol):
    """Bytes are counted as they come, so that none are kept for a frame that is announced and never ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._upgraded = self._proved = False
        self._unproved_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._upgraded and not self._proved:
            self._unproved_bytes += len(data)
            if self._unproved_bytes > MAX_UNPROVED_BYTES:
                self._refuse()
                return
        super().data_received(data)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        self._upgraded = True
        if not self.close_sent:
            self.scope["extensions"] = {**(self.scope["extensions"] or {}), _PROVED: {"say": self._prove}}

    def _prove(self) -> None:
        self._proved = True

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, f"more than {MAX_UNPROVED_BYTES} bytes before a proof")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()


def proved(websocket: WebSocket) -> None:
    """Its other end knows the secret: it may send frames of any length that the server takes."""
    websocket.scope["extensions"][_PROVED]["say"]()
