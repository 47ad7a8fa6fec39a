"""The node's end of its engine process: starts it, forwards frames, knows its status, sees it die.

Used by the node's main loop and its links. Never decodes what routers and engine say to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from pd_serve.config import EngineConfig
from pd_serve.node.liveness import Liveness
from pd_serve.processes import Child, describe_exit
from pd_serve.wire import engine as wire
from pd_serve.wire.link import Running, Status

log = logging.getLogger(__name__)

# Messages an engine may leave unread. It reads between any two steps: beyond this it hangs.
MAX_UNREAD = 100_000
_SHUTDOWN_S = 2.0


class EngineProcess:
    """Owns the engine process and the sockets to it. ``timeout_s``: the silence after which it counts as stopped."""

    def __init__(self, timeout_s: float) -> None:
        self._deliver: Callable[[int, bytes], None] = lambda _origin, _payload: None
        self._changed: Callable[[], None] = lambda: None
        self._directory = Path(tempfile.mkdtemp(prefix="pd-serve-"))
        self.address = f"ipc://{self._directory}/engine"
        self.pulse_address = f"ipc://{self._directory}/pulse"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # always read at once; the links bound what waits
        self._socket.bind(self.address)
        self._pulse: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pulse.bind(self.pulse_address)
        self._child: Child | None = None
        self.ready: wire.EngineReady | None = None
        self.status: Status | None = None
        self.ended_attempt: Callable[[wire.Timeline], None] = lambda _: None  # told of attempts with a span
        self.submits: dict[int, int] = {}  # by link: the number of the last submit that ``status`` includes
        self._liveness = Liveness(timeout_s, self._read)
        self._beats = 0
        self._started: asyncio.Event = asyncio.Event()
        self._drained: asyncio.Event = asyncio.Event()
        self._failure: str | None = None
        self._orders: dict[int, asyncio.Future[wire.SleepState]] = {}  # to sleep or wake, not answered yet
        self._order_numbers = itertools.count(1)

    def start(self, config: EngineConfig, *, command: list[str] | None = None) -> None:
        """Starts the process, on the main thread. ``command``: another engine than the real one, for tests."""
        command = command or [sys.executable, "-m", "pd_serve.engine"]
        self._child = Child(command, stdin=msgspec.json.encode(config))

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[int, bytes], None],
        changed: Callable[[], None],
    ) -> None:
        """Begins to read: outputs go to ``deliver(origin, payload)``; ``changed()`` after every status, after a beat
        during a step, and when ``trouble`` begins or ends."""
        self._deliver = deliver
        self._changed = changed
        for socket in (self._socket, self._pulse):
            loop.add_reader(socket.fileno(), self._read)
        loop.call_soon(self._read)
        self._liveness.begin(loop, changed)

    @property
    def running(self) -> Running | None:
        """The step, by its pulse."""
        return self._liveness.running

    @property
    def trouble(self) -> str:
        """Why the engine counts as stopped or hanging."""
        return self._liveness.trouble

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def alive(self) -> bool:
        return self._child is not None and self._child.returncode() is None

    async def wait_ready(self) -> wire.EngineReady | None:
        """Waits for the start to end: what the engine says of itself, or None when it failed (see ``failure``)."""
        await self._started.wait()
        return self.ready

    @property
    def failure(self) -> str:
        return self._failure or "the engine ended without a word; its output is above"

    def send(self, origin: int, payload: bytes) -> None:
        """Raises zmq.Again when the engine has stopped reading."""
        self._socket.send_multipart((origin.to_bytes(4, "little"), payload), zmq.NOBLOCK)
        # ZeroMQ's descriptor signals edges, and sending may consume one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._read)

    def tell(self, message: wire.ToEngine) -> None:
        """Sends a message of the node itself. An engine that has ended, or does not read, is beyond telling."""
        if not self.alive():
            return
        try:
            self.send(0, wire.encoder.encode(message))
        except zmq.Again:
            log.error("the engine does not read its messages: %s is lost", type(message).__name__)

    async def drain(self, timeout_s: float) -> bool:
        """Asks the engine to finish; False when it had not after ``timeout_s``."""
        self.tell(wire.Drain())
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def sleep(self, level: int, grace_s: float, hurry: Callable[[], Awaitable[None]]) -> wire.SleepState:
        """Asks the engine to sleep. Where it cannot within ``grace_s``, calls ``hurry`` and ends what still runs."""
        number, answer = self._order()
        self.tell(wire.Sleep(number, level))
        await asyncio.wait({answer}, timeout=grace_s)
        if not answer.done():
            log.warning("requests or leases are still there after %g s: they end now", grace_s)
            await hurry()
            self.tell(wire.Sleep(number, level, now=True))
        return await answer

    async def wake(self, tags: Sequence[str]) -> wire.SleepState:
        """Asks the engine to bring back what these tags held."""
        number, answer = self._order()
        self.tell(wire.Wake(number, list(tags)))
        return await answer

    async def listen(self) -> wire.SleepState:
        """Asks the engine to let readers in; ``ready`` then names where, unless it sleeps."""
        number, answer = self._order()
        self.tell(wire.Listen(number))
        return await answer

    async def forget(self) -> wire.SleepState:
        """Asks the engine to let no later prompt find KV that is cached now."""
        number, answer = self._order()
        self.tell(wire.Forget(number))
        return await answer

    def _order(self) -> tuple[int, asyncio.Future[wire.SleepState]]:
        number = next(self._order_numbers)
        answer = self._orders[number] = asyncio.get_running_loop().create_future()
        return number, answer

    async def wait_end(self) -> str:
        """Waits for the process to end; says how, in words."""
        assert self._child is not None
        status = await self._child.wait()
        self._read()  # its last words may have come first
        self._started.set()
        self._drained.set()
        for number in list(self._orders):
            self._answered(wire.SleepState(number, 0, [], failure="the engine ended"))
        return describe_exit(status)

    async def stop(self) -> None:
        """Ends the process, politely first. Idempotent."""
        if self._child is None or self._child.returncode() is not None:
            return
        if self.ready is None:
            self.kill()  # it does not read before it is ready, and has nothing to lose
        else:
            self.tell(wire.Shutdown())
        try:
            await asyncio.wait_for(self._child.wait(), _SHUTDOWN_S)
        except TimeoutError:
            log.warning("the engine did not end within %g s: it is killed", _SHUTDOWN_S)
            self.kill()
            await self._child.wait()

    def kill(self) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends the process if it still runs, closes the socket and removes its directory."""
        self.kill()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- reading ------------------------------------------------------------------------------------

    def _beat(self, beat: wire.Beat) -> None:
        self._beats += 1
        self._liveness.beat(beat.running)
        if beat.running is not None:
            self._changed()
        self._connected()

    def _connected(self) -> None:
        """When both sockets are, for good: without their path nobody else can, and a killed node leaves nothing."""
        if self._beats and self.ready is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _read(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._beat(wire.decode_beat(self._pulse.recv(zmq.NOBLOCK)))
                self._liveness.heard()
        while True:
            try:
                origin, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except (zmq.ZMQError, ValueError):
                log.exception("the engine's socket failed")
                return
            self._liveness.heard()
            number = int.from_bytes(origin, "little")
            if number:
                self._deliver(number, payload)
            else:
                self._hear(wire.decode_from_engine(payload))

    def _hear(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Report():
                self.status, self.submits = message.status, message.submits
                self._changed()
            case wire.EngineReady():
                self.ready = message
                self._liveness.started = True
                before = self.status or Status(message.load)
                self.status = msgspec.structs.replace(before, load=message.load)
                self._started.set()
                self._connected()
            case wire.EngineFailed():
                self._failure = message.message
                self._started.set()
            case wire.Drained():
                self._drained.set()
            case wire.SleepState():
                self._answered(message)
            case wire.Timeline():
                self.ended_attempt(message)

    def _answered(self, state: wire.SleepState) -> None:
        order = self._orders.pop(state.number, None)
        if order is not None and not order.done():
            order.set_result(state)
