"""The transfer ends of an engine's other ranks: what rank 0 asks of them, and what they say.

Every rank has a pool, a transfer thread and lanes of its own. Rank 0's main thread, which alone knows sequences and
blocks, does with the ends of all ranks what an engine of one rank does with its own. What it asks goes by ``send`` the
way that steps go, and nothing overtakes anything there: that blocks are not leased any more is heard before the step
that writes to them. What ranks say comes by a socket from each.

An *end* is one service of the transfer thread (an outbox, an inbox); what is asked of it and what it says are bytes
here. One that cannot be reached any more has ended with its process, and so has the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.worker import TransferWorker

log = logging.getLogger(__name__)

THREAD = "thread"  # what concerns the transfer thread itself
_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 20
_COUNT_S = 1.0  # between two looks at counters
_CLOSE_S = 5.0


class Frame(msgspec.Struct, array_like=True):
    """Between rank 0 and another rank. ``end``: a name, or :data:`THREAD`."""

    end: str
    message: bytes


class Open(msgspec.Struct, frozen=True, tag=True):
    """Starts a transfer thread, its ends under this epoch; answered with Opened or Broken."""

    epoch: str
    timeout_s: float


class Close(msgspec.Struct, frozen=True, tag=True):
    """Ends it; answered with Closed."""


class Opened(msgspec.Struct, frozen=True, tag=True):
    transport: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """It could not be started, or has given up."""

    why: str


class Counts(msgspec.Struct, frozen=True, tag=True):
    """Of each end, since it was opened, whenever they have changed."""

    counters: dict[str, dict[str, float]]
    misfits: dict[str, str]
    faults: int


class Closed(msgspec.Struct, frozen=True, tag=True):
    """``let_go``: no transfer touches the pool any more."""

    let_go: bool


_orders = msgspec.msgpack.Decoder(Open | Close)
_reports = msgspec.msgpack.Decoder(Opened | Broken | Counts | Closed)
_frames = msgspec.msgpack.Decoder(Frame)
_encode = msgspec.msgpack.Encoder().encode


# --- rank 0


class Relays:
    """Rank 0's half. ``ranks``: for each other rank, in order, how to send it bytes and where it says something."""

    def __init__(self, ranks: Sequence[tuple[Callable[[bytes], None], socket.socket]]) -> None:
        self._ranks = ranks
        self._said: defaultdict[str, deque[tuple[int, bytes]]] = defaultdict(deque)
        self._buffers = [bytearray() for _ in ranks]
        self._counts: dict[int, Counts] = {}
        self._reported: deque[tuple[int, Opened | Closed]] = deque()
        self._failure = ""
        self._poll = select.epoll()
        for _, sock in ranks:
            sock.setblocking(False)
            self._poll.register(sock, select.EPOLLIN)

    @property
    def count(self) -> int:
        """Ranks of the engine, this one included."""
        return len(self._ranks) + 1

    def fileno(self) -> int:
        """Readable while a rank says something."""
        return self._poll.fileno()

    def ask(self, end: str, message: object) -> None:
        """Of each other rank's end of that name. ``message``: encoded here. Raises TransferError where one is gone."""
        frame = _encode(Frame(end, _encode(message)))
        for rank, (send, _) in enumerate(self._ranks, 1):
            try:
                send(frame)
            except OSError:
                raise TransferError(FailureKind.TRANSFER, _ended(rank)) from None

    def said(self, end: str) -> list[tuple[int, bytes]]:
        """Rank and message, of what has come. Raises TransferError where a rank has given up or is gone."""
        self._read()
        if self._failure:
            raise TransferError(FailureKind.TRANSFER, self._failure)
        found = list(self._said[end])
        self._said[end].clear()
        return found

    def answers(self, end: str, timeout_s: float) -> list[bytes]:
        """One message from each other rank, by rank. Raises TransferError."""
        found: dict[int, bytes] = {}
        self._wait(lambda: len(found) == len(self._ranks), lambda: found.update(self.said(end)), timeout_s)
        return [found[rank] for rank in sorted(found)]

    def total(self, end: str, own: dict[str, float]) -> dict[str, float]:
        """The counters of all ranks' ends of that name, with rank 0's ``own``."""
        counted = Counter(own)
        for counts in self._counts.values():
            counted.update(counts.counters.get(end, {}))
        return dict(counted)

    @property
    def misfits(self) -> dict[str, str]:
        return {node: why for counts in self._counts.values() for node, why in counts.misfits.items()}

    @property
    def faults(self) -> int:
        return sum(counts.faults for counts in self._counts.values())

    def open(self, epoch: str, timeout_s: float) -> None:
        """Starts all other ranks' transfer threads; :meth:`wait_opened` waits for them."""
        self._counts.clear()
        self._said.clear()
        self._reported.clear()
        if not self._gone():
            self._failure = ""
        self.ask(THREAD, Open(epoch, timeout_s))

    def wait_opened(self, timeout_s: float) -> None:
        """Raises TransferError."""
        self._wait(lambda: len(self._reported) == len(self._ranks), lambda: self.said(THREAD), timeout_s)

    def close(self) -> bool:
        """Ends all other ranks' transfer threads. False: one may still touch its pool, or does not answer."""
        self._reported.clear()
        closed: list[Closed] = []

        def take() -> None:
            self._read()
            closed.extend(report for _, report in self._reported if isinstance(report, Closed))
            self._reported.clear()

        try:
            self.ask(THREAD, Close())
            self._wait(lambda: len(closed) == len(self._ranks), take, _CLOSE_S)
        except TransferError as error:
            log.error("the transfer threads of other ranks do not end: %s", error)
            return False
        return all(each.let_go for each in closed)

    def _wait(self, enough: Callable[[], bool], take: Callable[[], object], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not enough():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._gone():
                raise TransferError(FailureKind.TRANSFER, self._failure or f"no answer within {timeout_s:g} s")
            self._poll.poll(left_s)
            take()

    def _gone(self) -> bool:
        return any(sock.fileno() < 0 for _, sock in self._ranks)

    def _read(self) -> None:
        """What has come, by end."""
        for number, ((_, sock), buffer) in enumerate(zip(self._ranks, self._buffers, strict=True), 1):
            while sock.fileno() >= 0:
                try:
                    data = sock.recv(_CHUNK)
                except BlockingIOError:
                    break
                except OSError:
                    data = b""
                if not data:
                    self._lost(number, sock)
                    break
                buffer += data
            for payload in _whole(buffer):
                self._take(number, _frames.decode(payload))

    def _lost(self, rank: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._poll.unregister(sock)
        sock.close()
        self._failure = _ended(rank)

    def _take(self, rank: int, frame: Frame) -> None:
        if frame.end != THREAD:
            self._said[frame.end].append((rank, frame.message))
            return
        match _reports.decode(frame.message):
            case Counts() as counts:
                self._counts[rank] = counts
            case Broken(why):
                self._failure = f"rank {rank}: {why}"
            case report:
                self._reported.append((rank, report))


class RankedThread:
    """The transfer threads of all ranks, as :class:`pd_serve.engine.role.Transfer` has them."""

    def __init__(self, own: TransferWorker, relays: Relays) -> None:
        """``own``: rank 0's."""
        self._own = own
        self._relays = relays

    @property
    def internal_errors(self) -> int:
        return self._own.internal_errors + self._relays.faults

    def wait_ready(self, timeout_s: float) -> None:
        self._own.wait_ready(timeout_s)
        self._relays.wait_opened(timeout_s)

    @property
    def transport(self) -> str:
        return self._own.transport

    def close(self) -> bool:
        others = self._relays.close()
        return self._own.close() and others


# --- the other ranks


class End(Protocol):
    """A service of a rank's transfer thread, as rank 0 reaches it."""

    def told(self, message: bytes) -> bytes | None:
        """Does what rank 0 asks, on the rank's main thread; an answer goes back under the name ``NAME:answer``."""

    def fileno(self) -> int:
        """Readable while it has something to say."""

    def said(self) -> list[bytes]:
        """Raises TransferError where the transfer thread has given up."""

    def counters(self) -> dict[str, float]: ...

    def misfits(self) -> dict[str, str]: ...

    def close(self) -> None:
        """After the thread has ended."""


class Ends(Protocol):
    """A started transfer thread and its services."""

    @property
    def worker(self) -> TransferWorker: ...

    @property
    def remote(self) -> Mapping[str, End]: ...


class RelayServer:
    """Another rank's half. ``make_ends``: for an epoch; starts the transfer thread."""

    def __init__(self, sock: socket.socket, make_ends: Callable[[str], Ends]) -> None:
        self._sock = sock
        self._make_ends = make_ends
        self._lock = threading.Lock()  # main thread and relay thread both say something
        self._ends: Ends | None = None
        self._thread: threading.Thread | None = None
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def told(self, payload: bytes) -> None:
        """What rank 0 has sent, on the main thread, in order with steps."""
        frame = _frames.decode(payload)
        if frame.end == THREAD:
            match _orders.decode(frame.message):
                case Open(epoch, timeout_s):
                    self._open(epoch, timeout_s)
                case Close():
                    self._say(THREAD, Closed(self._close()))
        elif self._ends is not None and (answer := self._ends.remote[frame.end].told(frame.message)) is not None:
            self._send(f"{frame.end}:answer", answer)

    def close(self) -> None:
        self._close()
        os.close(self._stop)

    def _open(self, epoch: str, timeout_s: float) -> None:
        try:
            ends = self._ends = self._make_ends(epoch)
        except Exception as error:
            log.exception("the transfer thread cannot be started")
            self._say(THREAD, Broken(f"the transfer thread cannot be started: {error}"))
            return
        self._thread = threading.Thread(target=self._run, args=(ends, timeout_s), name="pd-relay", daemon=True)
        self._thread.start()

    def _close(self) -> bool:
        ends, thread = self._ends, self._thread
        if ends is None or thread is None:
            return True
        self._ends = self._thread = None
        let_go = ends.worker.close()
        os.eventfd_write(self._stop, 1)
        thread.join()
        os.eventfd_read(self._stop)
        for end in ends.remote.values():
            end.close()
        return let_go

    def _run(self, ends: Ends, timeout_s: float) -> None:
        """The relay thread: passes on what the ends say."""
        try:
            ends.worker.wait_ready(timeout_s)
            self._say(THREAD, Opened(ends.worker.transport))
            with select.epoll() as poll:
                poll.register(self._stop, select.EPOLLIN)
                for end in ends.remote.values():
                    poll.register(end.fileno(), select.EPOLLIN)
                self._relay(ends, poll)
        except TransferError as error:
            self._say(THREAD, Broken(str(error)))
        except Exception as error:
            log.exception("what this rank's transfers say cannot be passed on")
            self._say(THREAD, Broken(f"a fault ({error!r}); see its log"))

    def _relay(self, ends: Ends, poll: select.epoll) -> None:
        counts, counted_s = None, 0.0
        while True:
            came = {fd for fd, _ in poll.poll(_COUNT_S)}
            for name, end in ends.remote.items():
                for message in end.said():
                    self._send(name, message)
            now_s = time.monotonic()
            if not came or now_s >= counted_s + _COUNT_S:
                counted_s = now_s
                new = Counts(
                    {name: end.counters() for name, end in ends.remote.items()},
                    {node: why for end in ends.remote.values() for node, why in end.misfits().items()},
                    ends.worker.internal_errors,
                )
                if new != counts:
                    self._say(THREAD, counts := new)
            if self._stop in came:
                return

    def _say(self, end: str, message: object) -> None:
        self._send(end, _encode(message))

    def _send(self, end: str, message: bytes) -> None:
        payload = _encode(Frame(end, message))
        with self._lock, contextlib.suppress(OSError):  # rank 0 is gone: the main thread hears it
            self._sock.sendall(_LENGTH.pack(len(payload)) + payload)


def _ended(rank: int) -> str:
    return f"rank {rank} has ended; its log says why"


def _whole(buffer: bytearray) -> list[bytes]:
    """Takes the payloads out of it that are there to their end."""
    found, at = [], 0
    while len(buffer) - at >= _LENGTH.size:
        (size,) = _LENGTH.unpack_from(buffer, at)
        end = at + _LENGTH.size + size
        if len(buffer) < end:
            break
        found.append(bytes(buffer[at + _LENGTH.size : end]))
        at = end
    del buffer[:at]
    return found
