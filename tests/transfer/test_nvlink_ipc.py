"""Pools of plain device memory over cudaIpc: the transport's part, on memory of this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pd_serve.errors import TransferError
from pd_serve.memory.driver import DriverError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.base import PullState
from pd_serve.transfer.nvlink import NvlinkTransport
from pd_serve.transfer.nvlink.ipc import IpcAllocation
from tests.memory.memfd import MemfdDriver
from tests.transfer.nvlink_ends import Link, NumpyMover, Pool, blocks, finished, layout, pair_of, settled


class FakeIpc:
    """Handles name allocations of this process; opening one gives the same memory back."""

    def __init__(self, *pools: Pool) -> None:
        self.pools = pools
        self.opened: list[int] = []
        self.refuse = ""

    def export(self, device: int, address: int) -> IpcAllocation:
        if self.refuse:
            raise DriverError("cudaIpcGetMemHandle", self.refuse)
        for pool in self.pools:
            if pool.base <= address < pool.base + pool.size:
                return IpcAllocation(pool.base, pool.size, pool.base.to_bytes(64, "little"))
        raise DriverError("cuMemGetAddressRange", "CUDA_ERROR_NOT_FOUND")

    def open(self, device: int, handle: bytes) -> int:
        if self.refuse:
            raise DriverError("cudaIpcOpenMemHandle", self.refuse)
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def close(self, device: int, address: int) -> None:
        self.opened.remove(address)


@pytest.fixture
def pools() -> tuple[Pool, Pool]:
    driver = MemfdDriver()
    return Pool(driver, layout(), 16, seed=4), Pool(driver, layout(), 16)


def transport(pool: Pool, ipc: FakeIpc, tmp_path: Path) -> NvlinkTransport:
    made = NvlinkTransport(pool.driver, NumpyMover(), tmp_path, ipc)
    made.register(PoolMemory(0, tuple(pool.regions)))
    return made


def test_a_pool_is_opened_once_and_closed_with_its_last_session(pools: tuple[Pool, Pool], tmp_path: Path) -> None:
    theirs, ours = pools
    ipc = FakeIpc(theirs)
    source, reader = transport(theirs, ipc, tmp_path), transport(ours, ipc, tmp_path)
    pair = pair_of(layout(), theirs.regions, layout(), ours.regions)
    sessions = [Link(reader, source, pair).pump() for _ in range(2)]
    for n, session in enumerate(sessions):
        assert finished(reader.pull(session.peer, [blocks(1, [3 + n], [4 + n])])) is PullState.DONE
        assert np.array_equal(ours.group(1)[4 + n], theirs.group(1)[3 + n])
    assert ipc.opened == [theirs.base]
    sessions[0].close()
    settled(reader)
    assert ipc.opened == [theirs.base]
    sessions[1].close()
    settled(reader)
    assert ipc.opened == []
    assert list(tmp_path.iterdir()) == []
    reader.close()
    source.close()


def test_a_refusal_on_either_side_is_told(pools: tuple[Pool, Pool], tmp_path: Path) -> None:
    theirs, ours = pools
    here, there = FakeIpc(), FakeIpc(theirs)
    source, reader = transport(theirs, there, tmp_path), transport(ours, here, tmp_path)
    pair = pair_of(layout(), theirs.regions, layout(), ours.regions)
    there.refuse = "cudaErrorInvalidValue"
    session = Link(reader, source, pair).pump()
    with pytest.raises(TransferError, match="cudaErrorInvalidValue"):
        reader.pull(session.peer, [blocks(0, [1], [1])])
    session.close()
    there.refuse, here.refuse = "", "cudaErrorMapBufferObjectFailed"
    session = Link(reader, source, pair).pump()
    pull = reader.pull(session.peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert "PID namespace" in str(pull.error())
    session.close()
    reader.close()
    source.close()
    assert here.opened == there.opened == []
