"""Two ends of a UCX session with real ucxx: both in this process, or the source in one of its own."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.slices import Slicing, slicings
from pd_serve.transfer.ucx import UcxTransport
from pd_serve.transfer.ucx.reader import UcxPeer, UcxPull
from pd_serve.transfer.ucx.source import UcxReader
from tests.transfer.harness import Pool
from tests.transfer.processes import Killable, start


def blocks(group: int, remote: Any, local: Any) -> BlockMap:
    return BlockMap(group, np.asarray(remote, dtype=np.int64), np.asarray(local, dtype=np.int64))


def started(pool: Pool) -> UcxTransport:
    made = UcxTransport(HostMover())
    made.register(pool.memory())
    return made


def pair_of(source: KVLayout, reader: KVLayout, source_memory: PoolMemory, reader_memory: PoolMemory) -> Pair:
    return Pair(slicings(source, reader), source_memory.regions, reader_memory.regions)


class Ends:
    """Control messages wait in queues until ``turn``; ``source_asleep``: the source's thread does nothing."""

    def __init__(self, source: Pool, reader: Pool) -> None:
        self.source_pool, self.reader_pool = source, reader
        self.source, self.reader = started(source), started(reader)
        self.pair = pair_of(source.layout, reader.layout, source.memory(), reader.memory())
        self.to_source: deque[bytes] = deque()
        self.to_reader: deque[bytes] = deque()
        self.source_asleep = False
        self.meet()

    def meet(self) -> None:
        """A new session."""
        self.to_source.clear()
        self.to_reader.clear()
        self.served: UcxReader = self.source.serve(self.reader.describe(), self.pair, self.to_reader.append)
        self.peer: UcxPeer = self.reader.connect(self.source.describe(), self.pair, self.to_source.append)

    def part(self) -> None:
        self.peer.close()
        self.served.close()

    def turn(self) -> tuple[float, float]:
        source_s = 0.0
        if not self.source_asleep:
            while self.to_source:
                self.served.receive(self.to_source.popleft())
            source_s = self.source.progress()
        while self.to_reader:
            self.peer.receive(self.to_reader.popleft())
        return source_s, self.reader.progress()

    def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"nothing within {timeout_s} s"
            self.turn()

    def finish(self, pull: UcxPull) -> PullState:
        self.until(lambda: pull.poll() is not PullState.RUNNING)
        return pull.poll()

    def idle(self) -> bool:
        return self.turn() == (float("inf"), float("inf"))

    def close(self) -> None:
        self.reader.close()
        self.source.close()


def expected(slicing: Slicing, source: np.ndarray, reader: np.ndarray, item: BlockMap) -> np.ndarray:
    """The reader's array after the pull, byte by byte."""
    after = reader.copy()
    take, put = slicing.source_rows(Region(0, 1, 1), item.remote), slicing.reader_rows(Region(0, 1, 1), item.local)
    run = np.arange(slicing.row_bytes)
    where_from = (take.starts[:, None] + take.rows[None, :])[..., None] + run
    where_to = (put.starts[:, None] + put.rows[None, :])[..., None] + run
    after.reshape(-1)[where_to] = source.reshape(-1)[where_from]
    return after


class Target(Killable):
    """A source in a process of its own, and this process's reader of it."""

    def __init__(self, layout: KVLayout, num_blocks: int, **environment: str) -> None:
        self.pool = Pool(layout, num_blocks, seed=5)  # equal to the source's
        self.ours = Pool(layout, num_blocks)
        self.reader = started(self.ours)
        self.process, self.pipe = start(_target, layout, num_blocks, environment)
        assert self.pipe.poll(30)
        description, regions = self.pipe.recv()
        self.pair = pair_of(layout, layout, PoolMemory(None, regions), self.ours.memory())
        self.pipe.send(("serve", (self.reader.describe(), self.ours.memory().regions)))
        self.peer = self.reader.connect(description, self.pair, lambda message: self._send(("message", message)))

    def _send(self, what: Any) -> None:
        try:
            self.pipe.send(what)
        except OSError:
            pass  # it died

    def ask(self, what: str) -> Any:
        self._send((what, None))
        answer: list[Any] = []
        self.until(lambda: bool(self._take(answer)))
        return answer[0]

    def ask_quietly(self, what: str) -> Any:
        """While this process's UCX makes no progress."""
        self._send((what, None))
        answers: list[Any] = []
        while not answers:
            assert self.pipe.poll(10)
            self._take(answers)
        return answers[0]

    def _take(self, answers: list[Any] | None = None) -> list[Any] | None:
        try:
            while self.pipe.poll(0):
                kind, value = self.pipe.recv()
                if kind == "message":
                    self.peer.receive(value)
                elif answers is not None:
                    answers.append(value)
        except (EOFError, OSError):
            pass
        return answers

    def until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"nothing within {timeout_s} s"
            self._take([])
            time.sleep(min(self.reader.progress(), 0.001))

    def finish(self, pull: UcxPull) -> PullState:
        self.until(lambda: pull.poll() is not PullState.RUNNING)
        return pull.poll()

    def close(self) -> None:
        super().close()
        self.reader.close()


def _target(pipe: Connection, layout: KVLayout, num_blocks: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    pool = Pool(layout, num_blocks, seed=5)
    made = started(pool)
    pipe.send((made.describe(), pool.memory().regions))
    served: UcxReader | None = None
    while True:
        delay_s = made.progress()
        if not select.select([pipe], [], [], min(delay_s, 1.0))[0]:
            continue
        try:
            kind, value = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if kind == "serve":
            description, regions = value
            pair = pair_of(layout, layout, pool.memory(), PoolMemory(None, regions))
            served = made.serve(description, pair, lambda message: pipe.send(("message", message)))
        elif kind == "message":
            assert served is not None
            served.receive(value)
        elif kind == "staging":
            pipe.send(("answer", made.shared.staging.in_use))
        elif kind == "close":
            assert served is not None
            served.close()
            pipe.send(("answer", None))
        elif kind == "cpu":
            pipe.send(("answer", time.process_time()))
