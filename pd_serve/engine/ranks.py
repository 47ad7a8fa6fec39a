"""Rank 0's view of the engine's other ranks: their processes, and an executor that is all of them.

Every rank has its part of the weights and of each KV block (:mod:`pd_serve.models.shard`), computes every step and
samples the same tokens, so that nothing but sums and logits travels between ranks (:mod:`pd_serve.distributed`) and
nothing but steps from rank 0 to them. A rank that fails or dies takes the engine with it, by ``os._exit``: a device may
be waiting for it for ever. Nodes and routers know how to go on without an engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import zmq

from pd_serve.compute.copies import HostCopies
from pd_serve.compute.executor import Executor
from pd_serve.compute.step import Sampled, Step, encode
from pd_serve.config import EngineConfig
from pd_serve.engine import line
from pd_serve.engine.channel import Channel
from pd_serve.engine.line import Kind, Line, LineClosed
from pd_serve.engine.rank_copies import RankedCopies
from pd_serve.errors import ConfigError, PDServeError
from pd_serve.memory.region import PoolMemory
from pd_serve.processes import Child, describe_exit
from pd_serve.transfer.relay import Relays
from pd_serve.wire.engine import EngineFailed
from pd_serve.wire.memory import MemoryReport

if TYPE_CHECKING:
    import torch

    from pd_serve.distributed.group import Group

log = logging.getLogger(__name__)

START_S = 600.0  # a rank may compile kernels
LAST_WORD_S = 5.0  # for what a rank says that cannot start
ORDER_S = 120.0
END_S = 5.0


class RankConfig(msgspec.Struct):
    """What a rank's process reads from its standard input. File descriptors are inherited."""

    config: EngineConfig
    rank: int
    directory: str  # where ranks meet
    line_fd: int
    relay_fd: int
    copies_fd: int


def meet(directory: str, rank: int, ranks: int, device: torch.device) -> Group:
    """Waits for the other ranks."""
    from pd_serve.distributed.group import Group

    return Group(Path(directory), rank, ranks, device, timeout_s=START_S)


class Ranks:
    """Starts the other ranks' processes, and ends them. One that ends by itself, also asleep, ends this process.

    Made on the main thread, before there are others.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._count = config.tp
        self._address = config.address
        self._folder = tempfile.TemporaryDirectory(prefix="pd-serve-ranks-")
        self._processes: list[Child] = []
        self._lines: list[Line] = []
        self._relays: list[socket.socket] = []
        self._ended: list[socket.socket] = []  # what they say of copies
        self._started = False
        self._closed = threading.Event()
        for rank in range(1, config.tp):
            self._start(config, rank)
        threading.Thread(target=self._watch, name="pd-ranks", daemon=True).start()

    def _start(self, config: EngineConfig, rank: int) -> None:
        (ours, theirs), (our_relay, their_relay) = socket.socketpair(), socket.socketpair()
        our_ended, their_ended = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs, their_relay, their_ended:
            fds = (theirs.fileno(), their_relay.fileno(), their_ended.fileno())
            told = msgspec.json.encode(RankConfig(config, rank, self._folder.name, *fds))
            command = [sys.executable, "-m", "pd_serve.engine.worker"]
            self._processes.append(Child(command, stdin=told, fds=fds))
        self._lines.append(Line(ours))
        self._relays.append(our_relay)
        self._ended.append(our_ended)

    def _watch(self) -> None:
        """An engine that starts, sleeps or waits for its device does not look at the others' lines."""
        with select.epoll() as poll:
            ranks = {os.pidfd_open(process.pid): number for number, process in enumerate(self._processes)}
            for fd in ranks:
                poll.register(fd, select.EPOLLIN)
            [(fd, _)] = poll.poll(maxevents=1)
        for each in ranks:
            os.close(each)
        if not self._closed.wait(0.0 if self._started else LAST_WORD_S):
            status = self._processes[ranks[fd]].returncode()
            how = "" if status is None else f" ({describe_exit(status)})"
            why = f"rank {ranks[fd] + 1} has ended{how}; its log says why"
            if not self._started:
                why = self._tell_node(ranks[fd], why)
            _end(why)

    def _tell_node(self, number: int, why: str) -> str:
        """What a rank said that could not start, else ``why``: nobody heard it, as this one waits elsewhere for it."""
        with contextlib.suppress(TimeoutError, LineClosed):
            _, payload = self._lines[number].receive(0.1)
            why = f"rank {number + 1}: {line.decode_answer(payload).error}"
        with zmq.Context() as context, Channel(context, self._address) as channel:
            channel.send_node(EngineFailed(why))
        return why

    def relays(self) -> Relays:
        """Their transfer ends."""
        sends = [partial(each.send, Kind.TRANSFER) for each in self._lines]
        return Relays(list(zip(sends, self._relays, strict=True)))

    def copies(self, own: HostCopies) -> RankedCopies:
        """To and from all ranks' host tiers. ``own``: rank 0's."""
        return RankedCopies(own, self.tell, self._ended)

    def meet(self, device: torch.device) -> Group:
        return meet(self._folder.name, 0, self._count, device)

    def wait_started(self) -> None:
        """Raises ConfigError for what a user can mend, else PDServeError."""
        self._answers(START_S)
        self._started = True

    def tell(self, kind: Kind, payload: bytes) -> None:
        for each in self._lines:
            each.send(kind, payload)

    @contextmanager
    def order(self, message: line.Sleep | line.Wake) -> Iterator[None]:
        """All ranks do it while this one does, within the block. Raises PDServeError where one cannot."""
        self.tell(Kind.ORDER, line.encode(message))
        try:
            yield
        except Exception:
            with contextlib.suppress(PDServeError):  # the next order has answers of its own
                self._answers(ORDER_S)
            raise
        self._answers(ORDER_S)

    def _answers(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        failure: PDServeError | None = None
        for rank, each in enumerate(self._lines, 1):
            try:
                _, payload = each.receive(max(0.001, deadline_s - time.monotonic()))
            except TimeoutError:
                raise PDServeError(f"rank {rank} did not answer within {timeout_s:g} s; see its log") from None
            except LineClosed:
                raise PDServeError(f"rank {rank} has ended; its log says why") from None
            answer = line.decode_answer(payload)
            if answer.error:
                kind = ConfigError if answer.mendable else PDServeError
                failure = failure or kind(f"rank {rank}: {answer.error}")
                if not self._started:  # others may wait for it, and not answer
                    break
        if failure is not None:
            raise failure

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(LineClosed):
            if self._started:
                self.tell(Kind.ORDER, line.encode(line.Stop()))
        for each in self._lines:
            each.close()
        deadline_s = time.monotonic() + (END_S if self._started else 0.0)
        for process in self._processes:
            while process.returncode() is None and time.monotonic() < deadline_s:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        for said in (*self._relays, *self._ended):
            said.close()
        self._folder.cleanup()


def _end(why: str) -> NoReturn:
    """Without the interpreter's end, which may wait for a device that waits for another rank."""
    log.critical("the engine ends: %s", why)
    logging.shutdown()
    os._exit(1)


class RankedExecutor:
    """See :class:`pd_serve.compute.executor.Executor`. ``own``: rank 0's."""

    def __init__(self, own: Executor[Any], ranks: Ranks) -> None:
        self._own = own
        self._ranks = ranks

    @property
    def depth(self) -> int:
        return self._own.depth

    def launch(self, step: Step) -> Any:
        with self._fatal():
            self._ranks.tell(Kind.STEP, encode(step))
            return self._own.launch(step)

    def collect(self, launched: Any) -> Sampled:
        with self._fatal():
            return self._own.collect(launched)

    def done(self, launched: Any) -> bool:
        return self._own.done(launched)

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """What fails at one rank the others wait for, or have done."""
        try:
            yield
        except Exception as error:
            log.exception("a step failed, and with it the ranks of this engine")
            _end(repr(error))

    def memory(self) -> list[PoolMemory]:
        return self._own.memory()

    def load(self) -> None:
        self._own.load()

    def warm_up(self) -> None:
        self._own.warm_up()
        self._ranks.wait_started()

    @property
    def asleep(self) -> list[str]:
        return self._own.asleep

    def sleep(self, level: int) -> None:
        with self._ranks.order(line.Sleep(level)):
            self._own.sleep(level)

    def wake(self, tags: Collection[str]) -> None:
        with self._ranks.order(line.Wake(list(tags))):
            self._own.wake(tags)

    def report(self) -> MemoryReport:
        """Rank 0's: the others hold as much."""
        return self._own.report()

    def close(self) -> None:
        self._ranks.close()
        self._own.close()
