"""What a listener takes from strangers: uvicorn's HTTP protocol with bounds on sizes, times and connections.

Used by the router's and the nodes' servers, ``uvicorn.Config(http=bounded(...))``. Everything here happens before a
request reaches the application; what a whole request may hold is the application's own limit.

It relies on these parts of uvicorn's ``HttpToolsProtocol``, which tests/router/test_http_bounds.py looks for:
``connections``, ``pipeline``, ``cycle`` and its ``chunked_encoding``, ``disconnected`` and ``response_complete``,
``transport`` (its and the protocol's), ``headers``, ``flow``, ``send_400_response``, ``handle_websocket_upgrade`` and
httptools' ``on_...``
callbacks.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pd_serve.config import Common

log = logging.getLogger(__name__)

# Nobody's client pipelines; a chunk of 256 KiB can hold 14,000 requests, each of them a task.
_MAX_PIPELINED = 16
_LINGER_S = 2.0  # after a refusal what still arrives is dropped for so long, so that the client can read the answer
_LOOK_S = 0.5  # time-outs are up to twice this late
_MOST_FILES = 65_536
_FEWEST_CONNECTIONS = 16
_CONNECTION = "pd_serve.connection"


@dataclass(frozen=True)
class Bounds:
    """The settings of the same names."""

    max_head_bytes: int
    max_headers: int
    head_timeout_s: float
    body_timeout_s: float
    max_connections: int


def bounds_of(settings: Common) -> Bounds:
    """What the settings say, with as many connections as this process can open files, where they leave it open."""
    return Bounds(
        max_head_bytes=settings.max_head_bytes,
        max_headers=settings.max_headers,
        head_timeout_s=settings.head_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        max_connections=settings.max_connections or _connections_for(raise_file_limit()),
    )


def raise_file_limit() -> int:
    """How many files this process may open, after asking for more: the usual soft limit of 1024 is for ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


def _connections_for(files: int) -> int:
    """All but what links, logs and libraries need."""
    return max(_FEWEST_CONNECTIONS, files - max(64, files // 10))


class BoundedHttp(HttpToolsProtocol):
    """One connection. Made by :func:`bounded`, whose class attributes all connections of a listener share."""

    bounds: Bounds
    owing: dict[BoundedHttp, None]  # those that owe us bytes (a head, the rest of a body), longest first
    idle: dict[BoundedHttp, None]  # those between two requests, longest first
    looking: asyncio.TimerHandle | None
    # Time is counted in looks: while our own loop is busy or stopped, nobody's time passes but one look's.
    looks: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Weak: connection and request must not hold each other, or every request would be the garbage collector's.
        self._extensions: dict[str, dict[object, object]] = {_CONNECTION: {"weak": weakref.ref(self)}}
        self._told: Callable[[], None] | None = None  # what is to be called when the client leaves
        self._proven = False  # a whole request came over it
        self.cycle: RequestResponseCycle | None  # type: ignore[assignment]  # uvicorn's annotation leaves None out
        self._closed = False  # refused or ended: what comes is dropped
        self._in_head = self._in_body = False
        self._begun = 0  # the look since which the head, or the next byte of a body, is owed
        self._head_bytes = 0
        self._began = False  # a message began in the bytes just parsed
        self._carried = False  # and they held bytes of a body
        self._framing_bytes = 0  # of a body's chunk sizes and trailers, in a row

    # --- asyncio --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.server_state.connections) >= self.bounds.max_connections and not self._make_room():
            self.transport, self._closed = transport, True
            transport.write(_answer(503, "too many connections: try again", "too_many_connections"))
            transport.close()
            return
        super().connection_made(transport)
        self._owe()

    def connection_lost(self, exc: Exception | None) -> None:
        self.owing.pop(self, None)
        self.idle.pop(self, None)
        super().connection_lost(exc)
        self._left()

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        limit = self.bounds.max_head_bytes
        at = 0
        while at < len(data):
            # Fed so that a head cannot pass its limit unseen; httptools copies what it has of a field for every piece.
            size = len(data) - at if self._in_body else limit - self._head_bytes + 1
            part = data if not at and size >= len(data) else data[at : at + size]
            at += size
            after_body, self._began, self._carried = self._in_body, False, False
            super().data_received(part)
            if self._ended():
                return
            if self._in_head or self in self.idle:
                # of a part that began with a body's end, what is head is not known: it counts from the next one
                self._took_head(0 if after_body and self._began else len(part))
            elif self._in_body:
                self._took_body(len(part))
            else:
                self._head_bytes = 0

    def _ended(self) -> bool:
        return self._closed

    def _took_head(self, size: int) -> None:
        if self in self.idle:  # bytes that begin no message, such as an empty line
            self._owe()
        self._head_bytes += size
        if self._head_bytes > self.bounds.max_head_bytes:
            what, status = ("URL", 414) if not self.headers and len(self.url) * 2 > self._head_bytes else ("head", 431)
            self._refuse(
                status, f"the request's {what} is longer than {self.bounds.max_head_bytes} bytes", "head_too_large"
            )

    def _took_body(self, size: int) -> None:
        self._begun = self.looks
        self._framing_bytes = 0 if self._carried else self._framing_bytes + size
        if self._framing_bytes > self.bounds.max_head_bytes:
            self._refuse(431, "the trailers of the request's body are too long", "head_too_large")

    # --- httptools ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._began = True
        self._head_bytes = self._framing_bytes = 0
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise _Refused(429, f"more than {_MAX_PIPELINED} requests without waiting for an answer", "pipelining")
        self._owe()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        if len(self.headers) > self.bounds.max_headers:
            raise _Refused(431, f"more than {self.bounds.max_headers} headers: send fewer", "too_many_headers")
        super().on_headers_complete()
        self.scope["extensions"] = self._extensions

    def on_body(self, body: bytes) -> None:
        self._carried = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._proven = False, True
        self.owing.pop(self, None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for whatever its parser or a callback raised."""
        error = getattr(sys.exc_info()[1], "__context__", None)
        if isinstance(error, _Refused):
            self._refuse(error.status, error.message, error.code)
        else:
            self._refuse(400, "this is no HTTP request that can be read", "invalid_http")

    # --- uvicorn --------------------------------------------------------------------------------------

    def handle_websocket_upgrade(self) -> None:
        self._closed = True  # for this protocol: the WebSocket's takes over
        self.owing.pop(self, None)
        self.idle.pop(self, None)
        super().handle_websocket_upgrade()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._closed or self.transport.is_closing():
            return
        self._begun = self.looks
        if self._in_body and self._answered():
            self._linger()  # it was answered before it was all sent; the rest is of no use
        elif not self.pipeline and not self._in_head and self._answered():
            self.idle[self] = None

    def chunk(self, scope: Scope, body: bytes) -> bool:
        """See :func:`chunks`. Of the last request that came: others of a pipeline go the usual way."""
        cycle = self.cycle
        if (
            cycle is None
            or cycle.scope is not scope
            or not cycle.chunked_encoding
            or cycle.disconnected
            or cycle.response_complete
            or self.flow.write_paused
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def whole_body(self, scope: Scope) -> bytes | None:
        """See :func:`body_of`."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        self.flow.resume_reading()
        return body

    def tell(self, scope: Scope, left: Callable[[], None] | None) -> bool:
        """See :func:`leaves`."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or cycle.disconnected:
            return False
        self._told = left
        self.flow.resume_reading()  # the end of what the client sends is to be seen
        return True

    def _left(self) -> None:
        told, self._told = self._told, None
        if told is not None:
            told()

    # --- bounds ---------------------------------------------------------------------------------------

    def _owe(self) -> None:
        self.idle.pop(self, None)
        self.owing[self] = None
        self._begun = self.looks
        cls = type(self)
        if cls.looking is None:
            cls.looking = self.loop.call_later(_LOOK_S, cls._look, self.loop)

    @classmethod
    def _look(cls, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all connections: a request costs none."""
        cls.looking = loop.call_later(_LOOK_S, cls._look, loop) if cls.owing else None
        cls.looks += 1
        for connection in list(cls.owing):
            connection._check_time((cls.looks - connection._begun - 1) * _LOOK_S)

    def _check_time(self, waited_s: float) -> None:
        if self._closed:
            if waited_s >= _LINGER_S:
                self._abort()
        elif self._in_body:
            # Not while we are what it waits for: our reading pauses, or an earlier request is still being answered.
            if waited_s >= self.bounds.body_timeout_s and not self.flow.read_paused and not self.pipeline:
                self._refuse(408, f"no byte of the body came for {self.bounds.body_timeout_s:g} s", "body_timeout")
        elif waited_s >= self.bounds.head_timeout_s and self._answered():
            if self._in_head:
                self._refuse(408, f"the head was not there after {self.bounds.head_timeout_s:g} s", "head_timeout")
            else:
                self._abort()  # it said nothing at all

    def _make_room(self) -> bool:
        """Ends a connection that nobody waits for: first one that never sent a whole request, then an idle one."""
        victim = next((one for one in self.owing if not one._proven), None) or next(iter(self.idle), None)
        victim = victim or next(iter(self.owing), None)
        if victim is None:
            return False
        victim._abort()
        return True

    def _abort(self) -> None:
        self._closed = True
        self.owing.pop(self, None)
        self.idle.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answers where an answer can still be told from the one that is being sent, and ends the connection."""
        log.info("refused a request of %s: %d %s", self.client[0] if self.client else "a socket", status, message)
        if self._answered() or self._answerable():
            self.transport.write(_answer(status, message, code))
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                self._left()
            self._linger()
        else:
            self._abort()

    def _answerable(self) -> bool:
        """Nothing of the answer to the request under way was sent, and no other is in front of it."""
        return self._in_body and not self.pipeline and not self.cycle.response_started  # type: ignore[union-attr]

    def _answered(self) -> bool:
        """Every request that came whole has its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _linger(self) -> None:
        """Closes our side, and drops what still comes for a while: with bytes unread the kernel resets the answer."""
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self._owe()
            self._closed = True
            self.transport.write_eof()
        else:
            self._closed = True
            self.transport.close()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _answer(status: int, message: str, code: str) -> bytes:
    kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
    retry = "retry-after: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body


def abort(scope: Scope) -> bool:
    """Ends the connection of a request whose client does not read; what waits to be sent is dropped.

    Whether there is one: ``http.disconnect`` follows. In tests there may be none.
    """
    connection = _connection(scope)
    if connection is not None:
        connection.transport.abort()
    return connection is not None


def chunks(scope: Scope) -> Callable[[bytes], bool] | None:
    """What writes a part of a streamed answer's body at once, when its start was sent: a token costs no task and none
    of the layers between. False where nothing was written, for now (the client does not read) or for ever; the usual
    way tells which. In tests there may be none.
    """
    connection = _connection(scope)
    return None if connection is None else functools.partial(connection.chunk, scope)


def body_of(scope: Scope) -> bytes | None:
    """The body of a request where all of it is here, as it mostly is: had without a time-out and a turn of the loop.

    None where some is still to come, or where it has to be asked for the usual way. Once."""
    connection = _connection(scope)
    return None if connection is None else connection.whole_body(scope)


def leaves(scope: Scope, left: Callable[[], None] | None) -> bool:
    """Has ``left`` called, once, when the client of a request that came whole leaves before its answer ended: without a
    task that waits for it. None: no more. False where that has to be waited for the usual way.
    """
    connection = _connection(scope)
    return connection is not None and connection.tell(scope, left)


class Together:
    """What is sent of an answer in this block is written at once: head and body by one system call, not two.

    For a request that came whole. In tests it may do nothing."""

    def __init__(self, scope: Scope) -> None:
        connection = _connection(scope)
        cycle = None if connection is None else connection.cycle
        self._cycle = cycle if cycle is not None and cycle.scope is scope else None
        self._parts: list[bytes] = []
        self._closes = False

    def __enter__(self) -> None:
        if self._cycle is not None:
            self._transport = self._cycle.transport
            self._cycle.transport = cast(asyncio.Transport, self)

    def __exit__(self, *_: object) -> None:
        if self._cycle is not None:
            self._cycle.transport = self._transport
            if self._parts:
                self._transport.write(b"".join(self._parts))
            if self._closes:
                self._transport.close()

    # what uvicorn asks of a transport

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def close(self) -> None:
        self._closes = True


def _connection(scope: Scope) -> BoundedHttp | None:
    found = (scope.get("extensions") or {}).get(_CONNECTION)
    connection: BoundedHttp | None = None if found is None else found["weak"]()
    return connection


def bounded(settings: Common) -> type[asyncio.Protocol]:
    """The protocol for one listener, to be given to ``uvicorn.Config(http=...)``."""
    shared = {"bounds": bounds_of(settings), "owing": {}, "idle": {}, "looking": None, "looks": 0}
    return cast(type[asyncio.Protocol], type("Http", (BoundedHttp,), shared))
