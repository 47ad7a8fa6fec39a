"""A WebSocket client as an asyncio protocol: messages arrive and leave in plain calls, without a task for each.

Used by the links, where every token of every stream passes. The protocol itself is the websockets library's;
this file only moves its bytes.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from pd_serve.wire.link import MAX_FRAME_BYTES


class WebSocket(asyncio.Protocol):
    """``on_message`` gets every binary message; ``closed`` is done when the connection is gone.

    ``send``, ``ping``, ``close`` and ``abort`` never raise. On a closing link they do nothing: ``closed`` tells.
    """

    def __init__(self, uri: str, on_message: Callable[[bytes], None]) -> None:
        self._protocol = ClientProtocol(parse_uri(uri), max_size=MAX_FRAME_BYTES)
        self._on_message = on_message
        self._parts: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        loop = self._loop = asyncio.get_running_loop()
        self._flushes = False  # about to
        self.opened: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        self.heard_s = time.monotonic()  # when the last byte came
        self._why = ""

    @property
    def refused(self) -> bool:
        """The other end closed it because it wants nothing to do with this one."""
        close = self._protocol.close_rcvd
        return close is not None and close.code == CloseCode.POLICY_VIOLATION

    def send(self, message: bytes) -> None:
        """Written when the loop's turn ends, with what else was sent meanwhile."""
        if self._is_open():
            self._protocol.send_binary(message)
            if not self._flushes:
                self._flushes = True
                self._loop.call_soon(self._flush)

    def ping(self) -> None:
        if self._is_open():
            self._protocol.send_ping(b"")
            self._flush()

    def close(self, why: str) -> None:
        """Says good-bye; does not wait for the other end."""
        if self._transport is not None and not self.closed.done():
            self._why = self._why or why
            if self._is_open():
                self._protocol.send_close(1001, why.encode()[:100].decode(errors="ignore"))
                self._flush()
            self._transport.close()

    def abort(self, why: str) -> None:
        """For a peer that does not answer: unsent bytes are dropped."""
        if self._transport is not None and not self.closed.done():
            self._why = self._why or why
            self._transport.abort()

    def _is_open(self) -> bool:
        """Between a close frame, or the end of the stream, and ``connection_lost`` it no longer is."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._protocol.state is State.OPEN

    # --- asyncio.Protocol -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._protocol.send_request(self._protocol.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        self._protocol.receive_data(data)
        self._flush()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event)
            elif isinstance(event, Response):
                self._answer()

    def eof_received(self) -> bool:
        self._protocol.receive_eof()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        why = self._why or (f"{error}" if error else "the connection was closed")
        if not self.closed.done():
            self.closed.set_result(why)
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(why))
            self.opened.exception()  # nobody may be waiting

    def _answer(self) -> None:
        if self.opened.done():
            return
        error = self._protocol.handshake_exc
        if error is None:
            self.opened.set_result(None)
        else:
            self._why = f"the WebSocket handshake failed: {error}"
            if self._transport is not None:
                self._transport.close()

    def _frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.BINARY, Opcode.CONT):
            if frame.fin and not self._parts:
                self._on_message(bytes(frame.data))
                return
            self._parts.append(bytes(frame.data))
            if frame.fin:
                parts, self._parts = self._parts, []
                self._on_message(b"".join(parts))
        elif frame.opcode is Opcode.CLOSE:
            reason = self._protocol.close_rcvd.reason if self._protocol.close_rcvd is not None else ""
            self._why = self._why or f"the node closed the link{f': {reason}' if reason else ''}"
            if self._transport is not None:
                self._transport.close()
        elif frame.opcode is Opcode.TEXT:
            self.close("frames must be binary")

    def _flush(self) -> None:
        self._flushes = False
        transport = self._transport
        parts = self._protocol.data_to_send()
        if transport is None or transport.is_closing() or not parts:
            return
        ends = not parts[-1]  # an empty one, after all others: the end of what is sent
        if data := b"".join(parts):
            transport.write(data)
        if ends and transport.can_write_eof():
            transport.write_eof()


async def connect(
    url: str, path: str, on_message: Callable[[bytes], None], timeout_s: float, tls: ssl.SSLContext | None
) -> WebSocket:
    """Opens a WebSocket below an http(s) URL. Raises OSError (TimeoutError included) when that fails.

    ``tls``: how an https server is verified; None for http.
    """
    parts = urlsplit(url)
    name = parts.hostname or ""
    port = parts.port or (443 if tls else 80)
    host = f"[{name}]" if ":" in name else name
    uri = f"{'wss' if tls else 'ws'}://{host}:{port}{path}"
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        try:
            _, socket = await loop.create_connection(lambda: WebSocket(uri, on_message), name, port, ssl=tls)
        except ssl.SSLCertVerificationError as error:
            raise ConnectionError(
                f"its certificate cannot be verified: {error.verify_message}; give the CA's with --ssl-ca, and "
                "certificates the names that URLs use"
            ) from error
        except (ssl.SSLError, ConnectionResetError) as error:
            why = "; no TLS there? Give it --ssl-certfile, or use http://" if tls else ""
            raise ConnectionError(f"{str(error) or 'the connection was reset'}{why}") from error
        try:
            await socket.opened
        except ConnectionError as error:
            raise ConnectionError(f"{error}{'' if tls else ' (if it speaks TLS, its URL begins with https)'}") from None
        except BaseException:
            socket.abort("not opened")
            raise
    return socket
