"""Copies between a pool and its host tier: the right bytes, in memory and in a file, and what ends when."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pd_serve.compute.copies import Ended, HostCopies
from pd_serve.compute.cpu.host_copies import HostMover
from pd_serve.compute.cuda.host_copies import pieces
from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.pool import HostPool

LAYOUT = KVLayout(16, "bfloat16", (kv_group((0, 1), 3, 8), kv_group((2,), 1, 80, window=100)))
EACH = LAYOUT.block_bytes(0) + LAYOUT.block_bytes(1)


@pytest.fixture(params=["memory", "file"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> TierMemory:
    return TierMemory(LAYOUT, 20 * EACH, str(tmp_path / "kv") if request.param == "file" else "")


def blocks(pool: HostPool) -> list[torch.Tensor]:
    return [t.view(-1, LAYOUT.block_bytes(group)) for group, t in enumerate(pool.tensors())]


def wait(copies: HostCopies, count: int) -> list[Ended]:
    found: list[Ended] = []
    while len(found) < count:
        assert select.select([copies.fileno()], [], [], 10)[0], "nothing ended"
        found += copies.ended()
    return found


def test_blocks_come_back_as_they_were(tier: TierMemory, tmp_path: Path) -> None:
    assert tier.size_bytes <= 20 * EACH and min(tier.num_slots) >= 18
    pool = HostPool(LAYOUT, (8, 8))
    before = [torch.randint(0, 256, t.shape, dtype=torch.uint8) for t in blocks(pool)]
    for t, values in zip(blocks(pool), before, strict=True):
        t.copy_(values)
    copies = HostCopies(HostMover(pool.memory(), tier))
    last = tier.num_slots[0] - 1
    stored = [Copy(g, block, slot) for g in (0, 1) for block, slot in ((1, last), (2, 1), (7, 5))]
    copies.store(1, stored)
    assert [(e.ticket, e.whole) for e in wait(copies, 1)] == [(1, True)]
    for t in blocks(pool):
        t.zero_()
    copies.load(2, [Copy(c.group, (c.block + 1) % 8, c.slot) for c in stored])
    assert [(e.ticket, e.whole) for e in wait(copies, 1)] == [(2, True)]
    for t, values in zip(blocks(pool), before, strict=True):
        for block in (1, 2, 7):
            assert torch.equal(t[(block + 1) % 8], values[block])
        assert not t[[1, 4, 5, 6, 7]].any()
    assert not list(tmp_path.rglob("pd-serve-kv-*"))  # a file without a name
    copies.close()


class Slow:
    """A mover whose stores wait, and whose loads fail when they are told to."""

    num_slots = (4,)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.closed = False

    def store(self, copies: list[Copy]) -> None:
        assert self.go.wait(10)

    def load(self, copies: list[Copy]) -> None:
        if copies[0].slot == 3:
            raise OSError("no such slot")

    def discard(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def slow() -> Iterator[tuple[Slow, HostCopies]]:
    mover = Slow()
    copies = HostCopies(mover)
    yield mover, copies
    mover.go.set()
    copies.close()
    assert mover.closed


def test_loads_do_not_wait_for_stores(slow: tuple[Slow, HostCopies]) -> None:
    mover, copies = slow
    copies.store(1, [Copy(0, 1, 1)])
    copies.load(2, [Copy(0, 2, 2)])
    assert [e.ticket for e in wait(copies, 1)] == [2]
    mover.go.set()
    copies.drain()
    assert [e.ticket for e in copies.ended()] == [1]
    assert not select.select([copies.fileno()], [], [], 0)[0]


def test_a_copy_that_fails_says_so(slow: tuple[Slow, HostCopies]) -> None:
    _, copies = slow
    copies.load(1, [Copy(0, 1, 3)])
    copies.load(2, [Copy(0, 1, 2)])
    assert [(e.ticket, e.whole) for e in wait(copies, 2)] == [(1, False), (2, True)]


def test_no_copy_crosses_what_is_registered_apart() -> None:
    base, chunk = 5000, 1000
    host = np.array([5000, 5900, 5990, 6000, 7500], np.int64)
    sizes = np.array([1000, 100, 300, 250, 700], np.int64)
    device = host * 10
    parts = sorted(zip(*(each.tolist() for each in pieces(device, host, sizes, base, chunk)), strict=True))
    covered = sorted((d + i, h + i) for d, h, size in parts for i in range(size))
    assert covered == sorted((d + i, h + i) for d, h, s in zip(device, host, sizes, strict=True) for i in range(s))
    assert all((h - base) // chunk == (h + size - 1 - base) // chunk for _, h, size in parts)
    assert len(parts) == 7


def test_no_room_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no room for a KV block"):
        TierMemory(LAYOUT, EACH // 2)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--host-kv-path"):
        TierMemory(LAYOUT, 4 * EACH, str(tmp_path / "file"))
