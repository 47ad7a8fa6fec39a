"""The engine's pulse: a thread that tells the node what the main thread does, without waiting for it.

The main thread marks what it begins; the thread says so at fixed intervals over a socket of its own (ZeroMQ's must not
be shared). A node that hears nothing knows that the process is stopped or gone; one that hears of the same step for
longer than the step's limit knows that it hangs. Kernels, torch and waits release the interpreter, so the thread is
heard during the longest step. Must never do more than look and say: what it says has to be true when all else fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import zmq

from pd_serve.wire import engine as wire
from pd_serve.wire.link import Running

log = logging.getLogger(__name__)

BEATS_PER_TIMEOUT = 5
INTERVAL_MAX_S = 1.0
# A step may take so many times what steps took lately, a token; machines are shared and long contexts cost more.
PATIENCE = 10.0
# Without a step to measure by, so many times the least limit: a first chunk may have a slow device and cold caches.
UNMEASURED = 10.0
FADING = 0.95  # what a measured step weighs after each later one


@dataclass(frozen=True)
class _Doing:
    step: int
    tokens: int
    began_s: float
    limit_s: float


class Pulse:
    """``address``: where the node hears it. ``engine_timeout_s``: the silence after which the node gives the engine up.

    ``step_timeout_s``: the least time that the main thread may spend between two looks at its messages.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, engine_timeout_s: float, step_timeout_s: float
    ) -> None:
        self._context = context
        self._address = address
        self.interval_s = min(INTERVAL_MAX_S, engine_timeout_s / BEATS_PER_TIMEOUT)
        self._step_timeout_s = step_timeout_s
        self._doing: _Doing | None = None  # replaced as a whole: two threads look at it
        self._steps = 0
        self._measured_s = self._measured_tokens = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pd-pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- main thread

    def turn(self) -> None:
        """The main thread has something to do that is no step."""
        self._doing = _Doing(self._steps, 0, time.monotonic(), self._step_timeout_s)

    def rest(self) -> None:
        """The main thread waits for messages."""
        self._doing = None

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The main thread computes. Its time counts for the limits of later steps unless it raises."""
        self._steps += 1
        began_s = time.monotonic()
        self._doing = _Doing(self._steps, tokens, began_s, self.limit_s(tokens))
        yield
        ended_s = time.monotonic()
        self._measured_s = self._measured_s * FADING + ended_s - began_s
        self._measured_tokens = self._measured_tokens * FADING + tokens
        self.turn()

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """What moves memory or reads files takes as long as it takes; whoever ordered it waits for the answer."""
        self._doing = None
        try:
            yield
        finally:
            self.turn()

    def limit_s(self, tokens: int) -> float:
        """How long a step of so many tokens may take."""
        if not self._measured_tokens:
            return UNMEASURED * self._step_timeout_s
        return max(self._step_timeout_s, PATIENCE * tokens * self._measured_s / self._measured_tokens)

    # --- the thread

    def _run(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 1)  # what a node missed is of no use to it
        socket.connect(self._address)
        doing: _Doing | None = None
        running: Running | None = None
        passed_s, now_s = 0.0, time.monotonic()
        try:
            while True:
                was, before_s = doing, now_s
                doing, now_s = self._doing, time.monotonic()
                if doing is None:
                    running = None
                else:
                    since_s = before_s if doing is was else doing.began_s
                    # a process that was stopped did not get its time: that is nothing that the step has used
                    passed_s = (passed_s if doing is was else 0.0) + min(now_s - since_s, 2 * self.interval_s)
                    running = Running(doing.step, doing.tokens, round(passed_s, 3), round(doing.limit_s, 3))
                try:
                    socket.send(wire.encoder.encode(wire.Beat(running)), zmq.NOBLOCK)
                except zmq.Again:
                    log.debug("the node does not listen to the engine's pulse")
                # of an engine that waits half as many: far more often still than the node gives it up
                if self._stopping.wait(self.interval_s * (2 if doing is None else 1)):
                    return
        finally:
            socket.close()
