"""Server-sent events of an answer that comes token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pd_serve.router.backends.served import failure_of

_MAX_BYTES = 64 << 20  # of one event, and of an answer that is none
_DONE = b"[DONE]"


class Events:
    """What follows ``data:`` of each line. Comments and other fields mean nothing here."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class StreamAnswer(ABC):
    """See :class:`pd_serve.router.backends.http.Answer`. ``complete``: the request has ended as it should."""

    def __init__(self) -> None:
        self.complete = False
        self._status, self._kind = 0, ""
        self._events = Events()
        self._other = b""
        self._failed = False

    @abstractmethod
    def take(self, event: bytes) -> str | None:
        """What is wrong, if something is."""

    @abstractmethod
    def failed(self, kind: str, message: str, *, lost: bool) -> None:
        """Once, and nothing follows. ``kind``: of :class:`pd_serve.wire.link.Failure`. ``lost``: the server has not
        said so itself."""

    def head(self, status: int, kind: str) -> None:
        self._status, self._kind = status, kind

    def data(self, data: bytes) -> None:
        if self._status != 200 or self._kind != "text/event-stream":
            self._other = (self._other + data)[:_MAX_BYTES]
            return
        for event in self._events.feed(data):
            if self.complete or self._failed or event == _DONE:
                return
            wrong = self.take(event)
            if wrong is not None:
                self._fail("internal", wrong)

    def end(self, error: str | None) -> None:
        if self.complete or self._failed:
            return
        if error is not None:
            self._fail("internal", error, lost=True)
        elif self._status != 200:
            self._fail(*failure_of(self._status, self._other))
        else:
            self._fail("internal", "its answer ended before the request had")

    def _fail(self, kind: str, message: str, *, lost: bool = False) -> None:
        self._failed = True
        self.failed(kind, message, lost=lost)
