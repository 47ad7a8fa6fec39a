"""Two ends of a transfer, with real NIXL unless a test brings other lanes: pools of random bytes, an outbox, an inbox,
an outbox in its own process.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from pd_serve.decode.inbox import Event, Inbox, Offered
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.prefill.outbox import LeaseEnded, Outbox
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.session.handshake import Identity
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks
from tests.transfer.processes import Killable, start
from tests.transfer.scripted import aligned

# two groups with blocks of different size, the second with a window
SMALL = KVLayout(4, "float32", (kv_group((0, 1), 1, 8), kv_group((2, 3, 4), 1, 8, window=16)))
# one group, 256 KiB a block: large enough that a transfer over TCP takes a while
LARGE = KVLayout(16, "float32", (kv_group(tuple(range(16)), 2, 64),))

T = TypeVar("T")
_names = itertools.count()


def agent_name(prefix: str) -> str:
    return f"{prefix}-{os.getpid()}-{next(_names)}-{uuid.uuid4().hex[:6]}"


def until(ask: Callable[[], T | None], timeout_s: float = 10.0) -> T:
    """What ``ask`` answers, once it answers something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"nothing within {timeout_s} s"
        time.sleep(0.002)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Pool:
    """One array of bytes a group, and one for the probe region."""

    def __init__(self, layout: KVLayout, num_blocks: int, seed: int | None = None) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        rng = np.random.default_rng(seed)
        self.groups: list[np.ndarray[Any, Any]] = []
        for group in range(len(layout.groups)):
            shape = (num_blocks, layout.block_bytes(group))
            array = aligned(shape[0] * shape[1]).reshape(shape)
            array[:] = 7 if seed is None else rng.integers(0, 256, shape, dtype=np.uint8)
            self.groups.append(array)
        self.probe = aligned(PROBE_BLOCKS * PROBE_BLOCK_BYTES).reshape(PROBE_BLOCKS, PROBE_BLOCK_BYTES)

    def memory(self) -> PoolMemory:
        arrays = [*self.groups, self.probe]
        return PoolMemory(None, tuple(Region(a.ctypes.data, a.shape[1], a.shape[0]) for a in arrays))


def nixl_lanes(memory: PoolMemory) -> Lanes:
    return lanes_for("nixl", agent_name("h"), memory, reads_only=False)


def identity(node_id: str, layout: KVLayout, /, **other: Any) -> Identity:
    values = {"node_id": node_id, "epoch": uuid.uuid4().hex, "model": "m0", "layout": layout}
    return Identity(**{**values, **other})


class PrefillEnd:
    def __init__(
        self,
        layout: KVLayout = SMALL,
        num_blocks: int = 64,
        *,
        seed: int = 1,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        me: dict[str, Any] | None = None,
        lanes: Callable[[PoolMemory], Lanes] = nixl_lanes,
        tls: Tls | None = None,
    ) -> None:
        self.pool = Pool(layout, num_blocks, seed)
        self.identity = identity("P", layout, **(me or {}))
        self.worker = TransferWorker(lanes(self.pool.memory()), clock)
        self.outbox = Outbox(self.identity, self.worker, host="127.0.0.1", lease_s=lease_s, tls=tls)
        self.worker.start()
        self.worker.wait_ready()
        (self.address,) = self.outbox.listen(10)
        self.ended: list[LeaseEnded] = []

    @property
    def source(self) -> Source:
        return Source(self.identity.node_id, self.identity.epoch, (self.address,))

    def publish(
        self, key: str, num_tokens: int, tables: list[list[int]], first: int = 0, token: int | None = None
    ) -> None:
        """Announces each group's blocks ``tables[group][first:]``."""
        blocks = [(group, first, table[first:]) for group, table in enumerate(tables) if table[first:]]
        self.publish_blocks(key, num_tokens, blocks, token)

    def publish_blocks(
        self, key: str, num_tokens: int, blocks: list[tuple[int, int, list[int]]], token: int | None = None
    ) -> None:
        """Announces blocks: group, first logical block, pool blocks."""
        items = [Blocks(group, first, np.array(ids, dtype="<i4").tobytes()) for group, first, ids in blocks]
        self.outbox.publish(key, num_tokens, items, token)

    def why(self, key: str) -> str | None:
        self.ended += self.outbox.events()
        return next((e.why for e in self.ended if e.key == key), None)

    def close(self) -> bool:
        """Whether the pool may be used for something else."""
        closed = self.worker.close()
        self.outbox.close()
        return closed


class DecodeEnd:
    def __init__(
        self,
        layout: KVLayout = SMALL,
        num_blocks: int = 64,
        *,
        pull_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        me: dict[str, Any] | None = None,
        lanes: Callable[[PoolMemory], Lanes] = nixl_lanes,
        tls: Tls | None = None,
    ) -> None:
        self.pool = Pool(layout, num_blocks)
        self.identity = identity("D", layout, **(me or {}))
        self.worker = TransferWorker(lanes(self.pool.memory()), clock)
        self.inbox = Inbox(self.identity, self.worker, pull_timeout_s=pull_timeout_s, tls=tls)
        self.worker.start()
        self.worker.wait_ready()
        self.seen: list[Event] = []

    def accept(self, key: str, tables: list[list[int]], first: list[int] | None = None) -> None:
        self.inbox.accept(key, [np.array(t, dtype=np.int32) for t in tables], first or [0] * len(tables))

    def take(self) -> list[Event]:
        self.seen += self.inbox.events()
        return self.seen

    def find(self, key: str, kind: type[T]) -> T | None:
        return next((e for e in self.take() if isinstance(e, kind) and e.key == key), None)  # type: ignore[attr-defined]

    def wait(self, key: str, kind: type[T], timeout_s: float = 10.0) -> T:
        return until(lambda: self.find(key, kind), timeout_s)

    def ends(self, key: str) -> list[type]:
        """The kinds of events that ended a key, in order."""
        return [type(e) for e in self.take() if e.key == key and not isinstance(e, Offered)]

    def close(self) -> bool:
        """Whether the pool may be used for something else."""
        closed = self.worker.close()
        self.inbox.close()
        return closed


# --- an outbox in its own process, to be killed and stopped


class PrefillProcess(Killable):
    """A prefill end in a process of its own. Tests command it through a pipe."""

    def __init__(self, layout: KVLayout = SMALL, num_blocks: int = 64, **options: Any) -> None:
        self.process, self._pipe = start(_serve, layout, num_blocks, options)
        self.source: Source = self._answer(30.0)
        self.pool = Pool(layout, num_blocks, options.get("seed", 1))

    def _answer(self, timeout_s: float) -> Any:
        assert self._pipe.poll(timeout_s), "the prefill process does not answer"
        return self._pipe.recv()

    def ask(self, what: str, *args: Any, timeout_s: float = 10.0) -> Any:
        self._pipe.send((what, args))
        return self._answer(timeout_s)

    def tell(self, what: str, *args: Any) -> None:
        """For commands that take their time: the answer is read by ``wait``."""
        self._pipe.send((what, args))

    def wait(self, timeout_s: float = 30.0) -> Any:
        return self._answer(timeout_s)

    def close(self) -> None:
        super().close()
        self._pipe.close()


def _serve(pipe: Connection, layout: KVLayout, num_blocks: int, options: dict[str, Any]) -> None:
    end = PrefillEnd(layout, num_blocks, **options)
    pipe.send(end.source)
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:
            os._exit(0)
        match what:
            case "open":
                end.outbox.open(*args)
            case "publish":
                end.publish(*args)
            case "why":
                pipe.send(end.why(*args))
                continue
            case "busy":
                _compute(*args)
        pipe.send(what)


def _compute(seconds: float) -> None:
    """Holds the GIL in pure Python and drops it in large matrix products, by turns, as an engine does."""
    x = np.random.default_rng(0).random((600, 600))
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        x = x @ x / 600.0
        sum(i * i for i in range(50_000))
