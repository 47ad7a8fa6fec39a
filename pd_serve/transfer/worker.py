"""The engine's transfer thread: it owns the lanes and all peer sockets, and runs services on them.

The services are the outbox and the inbox. The main thread hands them closures with ``call`` and reads
their events from mailboxes; nothing else is shared. The thread sleeps until a socket
or a call wakes it or a service's next deadline is due; only while a pull is under way does it look
again at short intervals. In between it sleeps, but beside a GPU, whose host has cores to spare (:mod:`poller`).

A fault ends what it concerns, not the thread. Where every turn fails nothing is looked after any more: after some
seconds of that the thread closes everything and the engine ends (``check``), for a new one to be started.
"""

from __future__ import annotations

import logging
import math
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.poller import Poller
from pd_serve.transfer.session.connection import Resolved, is_numeric, resolve

log = logging.getLogger(__name__)

Clock = Callable[[], float]  # seconds, monotonic
T = TypeVar("T")

MAX_SLEEP_S = 60.0
FAULT_PAUSE_S = 0.1  # after a turn that failed
GIVE_UP_S = 5.0  # after so long without one that did not


class Service(Protocol):
    """What runs on the transfer thread. Every method is called there."""

    def start(self) -> None:
        """The lanes are started. What it raises makes the start fail."""

    def run_due(self, now_s: float) -> float:
        """Does what is due; returns in how many seconds it wants to be called again (``inf``: not by itself)."""

    def stop(self) -> bool:
        """Says goodbye and closes the sockets. False: something may still write to the pool."""

    def gave_up(self) -> None:
        """After ``stop``: the thread has ended by itself. Makes the main thread call ``check``."""


class Source(Protocol):
    """What the thread can wait for beside its own timer and calls."""

    def fileno(self) -> int: ...

    @property
    def interest(self) -> int:
        """``select.EPOLLIN``, ``EPOLLOUT``."""


class TransferWorker:
    """The thread. ``lanes`` start on it: NIXL takes 0.4 s, which overlaps with loading a model."""

    def __init__(self, lanes: Lanes, clock: Clock = time.monotonic) -> None:
        self._services: list[Service] = []
        self.lanes = lanes
        self.clock = clock
        self._calls: Mailbox[Callable[[], object]] = Mailbox()
        self._ready: Future[None] = Future()
        self._stopping = False
        self._let_go = True  # nothing uses the pool (any more)
        self._handlers: dict[int, Callable[[], object]] = {}  # by file descriptor
        self.internal_errors = 0
        self._failing_since_s = math.inf  # on the system's clock
        self._failure = ""  # why the thread ended by itself
        self._poller = Poller(spin=lanes.memory.device is not None)
        self._thread = threading.Thread(target=self._run, name="pd-transfer", daemon=True)

    # --- main thread

    def add(self, service: Service) -> None:
        """Before ``start``."""
        self._services.append(service)

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the services run. Raises TransferError when it cannot."""
        try:
            self._ready.result(timeout_s)
        except TimeoutError:
            raise TransferError(FailureKind.TRANSFER, f"the transport was not ready within {timeout_s:g} s") from None

    @property
    def transport(self) -> str:
        """Names of the lanes that started, separated by commas, preferred first; once ready."""
        return ",".join(self.lanes.names)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Runs ``function(*args)`` on the transfer thread, after all earlier calls."""
        self._calls.put(lambda: function(*args))

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """What ``function`` answers, or raises, on the transfer thread, once that serves."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        self.call(run)
        return answer

    def wake(self) -> None:
        """Makes the thread look at its clock again."""
        self.call(lambda: None)

    def check(self) -> None:
        """Raises TransferError where the thread has given up."""
        if self._failure:
            raise TransferError(FailureKind.TRANSFER, self._failure)

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stops the services, the lanes and the thread. False: something may still use the pool. Idempotent."""
        if self._thread.is_alive():
            self.call(setattr, self, "_stopping", True)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.error("the transfer thread did not stop within %g s", timeout_s)
                return False
        self._calls.close()
        return self._let_go

    # --- transfer thread

    def resolve(self, address: str, then: Callable[[Resolved | OSError], object]) -> None:
        """Calls ``then`` with what an address stands for; later, where it takes a name service to know that."""
        if is_numeric(address):
            then(_resolved(address))
        else:
            ask = threading.Thread(target=lambda: self.call(then, _resolved(address)), name="pd-resolve", daemon=True)
            ask.start()

    def listen(self, source: Source, handler: Callable[[], object]) -> None:
        """Calls ``handler`` whenever ``source`` can do what it is interested in, until ``unlisten``."""
        self._handlers[source.fileno()] = handler
        self._poller.register(source.fileno(), source.interest)

    def interest_changed(self, source: Source) -> None:
        self._poller.modify(source.fileno(), source.interest)

    def unlisten(self, source: Source) -> None:
        """Before ``source`` is closed."""
        if self._handlers.pop(source.fileno(), None) is not None:
            self._poller.unregister(source.fileno())

    def _run(self) -> None:
        started: list[Service] = []
        try:
            self._poller.register(self._calls.fileno(), select.EPOLLIN)
            self.lanes.start()
            for service in self._services:
                service.start()
                started.append(service)
        except Exception as error:
            for service in started:
                self._guarded(service.stop)
            self._guarded(self.lanes.close)
            self._poller.close()
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._stopping:
            self._guarded(self._turn)
        ends = [self._guarded(end) for end in [*(service.stop for service in self._services), self.lanes.close]]
        self._let_go = all(ends)
        self._poller.close()
        if self._failure:
            for service in self._services:
                self._guarded(service.gave_up)

    def _turn(self) -> None:
        for call in self._calls.take():
            self._guarded(call)
        if self._stopping:
            return
        delay_s = MAX_SLEEP_S
        try:
            delay_s = min(self.lanes.progress(), *(service.run_due(self.clock()) for service in self._services))
            self._failing_since_s = math.inf
        except Exception as error:
            self.fault(known=self._failing_since_s < math.inf)
            delay_s = FAULT_PAUSE_S
            self._failing_since_s = min(self._failing_since_s, time.monotonic())
            if time.monotonic() >= self._failing_since_s + GIVE_UP_S:
                self._failure = f"the transfer thread has failed for {GIVE_UP_S:g} s in every turn ({error!r})"
                self._stopping = True
                return
        for descriptor in self._poller.wait(min(delay_s, MAX_SLEEP_S)):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                self._guarded(handler)

    def _guarded(self, function: Callable[[], object]) -> object:
        """One request's fault must not take the thread, and with it every other request, down. None where it faults."""
        try:
            return function()
        except Exception:
            self.fault()
            return None

    def fault(self, *, known: bool = False) -> None:
        """Books the exception that is being handled. Called on the transfer thread. ``known``: the log has had it."""
        self.internal_errors += 1
        log.error("a fault on the transfer thread", exc_info=not known)


def _resolved(address: str) -> Resolved | OSError:
    try:
        return resolve(address)
    except OSError as error:
        return error
