"""Memory that is exchanged under its addresses, and a pool that grows: on host memory (tests/memory/memfd.py)."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory import device_pool
from pd_serve.memory.cumem import CumemAllocator, MemoryAsleep, OutOfDeviceMemory
from pd_serve.memory.device_pool import DevicePool
from pd_serve.memory.driver import DriverError, HandleType
from pd_serve.memory.host_buffers import HostBuffers
from tests.memory.memfd import GRANULARITY as G
from tests.memory.memfd import NOT_PERMITTED, OUT_OF_MEMORY, MemfdDriver


def make(capacity: int = 16 * G) -> tuple[MemfdDriver, CumemAllocator]:
    driver = MemfdDriver(capacity=capacity, refuse={HandleType.FABRIC: NOT_PERMITTED})
    allocator = CumemAllocator(driver, 0, HostBuffers())
    assert allocator.kind.handle_type is HandleType.POSIX_FD
    return driver, allocator


def books(allocator: CumemAllocator, tag: str = "kv_cache") -> tuple[int, int]:
    usage = allocator.report().tags[tag]
    return usage.bytes, usage.reserved_bytes


def kv(allocator: CumemAllocator, size: int, reserve: int) -> int:
    with allocator.tagged("kv_cache"):
        return allocator.malloc(size, reserve=reserve)


def test_one_handle_of_the_final_size_at_the_same_address() -> None:
    driver, allocator = make()
    address = kv(allocator, G, 12 * G)
    assert (driver.used, driver.live_reservations) == (G, 1)
    reservations = driver.calls.count("reserve")
    allocator.resize({address: 10 * G - 5})
    assert driver.calls.count("reserve") == reservations  # the range was never given up
    (segment,) = allocator.segments("kv_cache")
    assert (segment.address, segment.size_bytes) == (address, 10 * G)
    assert (driver.used, driver.live_handles, driver.live_mappings) == (10 * G, 1, 1)
    assert books(allocator) == (10 * G - 5, 10 * G)
    ctypes.memset(address, 7, 10 * G - 5)
    fd = driver.export_fd(segment.handle)
    with mmap.mmap(fd, 10 * G) as peers:
        assert peers[10 * G - 6] == 7
    os.close(fd)
    allocator.resize({address: 2 * G})  # and smaller
    assert books(allocator) == (2 * G, 2 * G)
    allocator.free(address)
    assert books(allocator) == (0, 0)
    driver.check_clean()


def test_the_old_memory_is_given_back_before_the_new_is_asked_for() -> None:
    driver, allocator = make(capacity=12 * G)
    address = kv(allocator, 4 * G, 12 * G)
    allocator.resize({address: 12 * G})
    assert driver.used == driver.capacity
    allocator.close()
    driver.check_clean()


def test_too_much_restores_what_there_was_and_says_what_is_free() -> None:
    driver, allocator = make(capacity=12 * G)
    address = kv(allocator, 2 * G, 64 * G)
    with pytest.raises(
        OutOfDeviceMemory, match=rf"no {13 * G} bytes for 'kv_cache'; {12 * G} of {12 * G} bytes are free"
    ):
        allocator.resize({address: 13 * G})
    assert allocator.asleep == []
    assert books(allocator) == (2 * G, 2 * G)
    assert allocator.report().tags["kv_cache"].peak_bytes == 2 * G
    ctypes.memset(address, 1, 2 * G)
    allocator.resize({address: 12 * G})
    allocator.close()
    driver.check_clean()


def test_several_ranges_change_together_or_not_at_all() -> None:
    driver, allocator = make(capacity=12 * G)
    one, two = kv(allocator, G, 8 * G), kv(allocator, G, 8 * G)
    with pytest.raises(OutOfDeviceMemory):
        allocator.resize({one: 7 * G, two: 6 * G})
    assert [s.size_bytes for s in allocator.segments()] == [G, G]
    allocator.resize({one: 7 * G, two: 5 * G})
    assert [s.size_bytes for s in allocator.segments()] == [7 * G, 5 * G]
    with pytest.raises(ValueError, match="do not fit"):
        allocator.resize({one: G, two: 9 * G})
    assert [s.size_bytes for s in allocator.segments()] == [7 * G, 5 * G]
    allocator.close()
    driver.check_clean()


@pytest.mark.parametrize("call", ["unmap", "release", "create", "map", "synchronize"])
def test_a_failing_driver_leaves_the_old_size(call: str) -> None:
    driver, allocator = make()
    address = kv(allocator, G, 8 * G)
    driver.fail(call, "CUDA_ERROR_UNKNOWN")
    with pytest.raises(DriverError, match=call):
        allocator.resize({address: 8 * G})
    assert allocator.asleep == []
    assert books(allocator) == (G, G)
    ctypes.memset(address, 1, G)
    allocator.resize({address: 8 * G})
    allocator.close()
    driver.check_clean()


def test_where_not_even_the_old_memory_is_to_be_had_it_sleeps() -> None:
    driver, allocator = make()
    address = kv(allocator, 2 * G, 8 * G)
    driver.fail("create", OUT_OF_MEMORY, OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory):
        allocator.resize({address: 8 * G})
    assert allocator.asleep == ["kv_cache"]
    assert books(allocator) == (2 * G, 0)
    with pytest.raises(MemoryAsleep):
        allocator.resize({address: 8 * G})
    allocator.sleep()
    allocator.wake()
    assert books(allocator) == (2 * G, 2 * G)
    ctypes.memset(address, 1, 2 * G)
    driver.fail("create", OUT_OF_MEMORY, OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory):
        allocator.resize({address: 8 * G})
    allocator.close()  # in that state too
    driver.check_clean()


@pytest.mark.parametrize("keep", [(), ("kv_cache",)])
def test_the_final_memory_sleeps_and_wakes_twenty_times(keep: tuple[str, ...]) -> None:
    driver, allocator = make()
    address = kv(allocator, G, 8 * G)
    allocator.resize({address: 6 * G})
    ctypes.memset(address, 9, 6 * G)
    counts = set()
    for _ in range(20):
        allocator.sleep(keep)
        assert driver.used == 0
        with pytest.raises(MemoryAsleep):
            allocator.resize({address: G})
        allocator.wake()
        if keep:
            assert set(ctypes.string_at(address, 6 * G)) == {9}
        counts.add((driver.used, driver.live_handles, driver.live_reservations, books(allocator)))
    assert counts == {(6 * G, 1, 1, (6 * G, 6 * G))}
    allocator.sleep()
    allocator.close()
    driver.check_clean()


def test_what_cannot_be_resized() -> None:
    driver, allocator = make()
    address = kv(allocator, 3 * G, 0)
    for sizes in ({address: 3 * G + 1}, {address: 0}, {address + 1: G}, {address: G, 5: G}):
        with pytest.raises(ValueError):
            allocator.resize(sizes)
    assert books(allocator) == (3 * G, 3 * G)
    allocator.close()
    driver.check_clean()


# the pool


def on_host(address: int, size: int, _device: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@pytest.fixture
def _host_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pool, "tensor_at", on_host)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)


LAYOUT = KVLayout(16, "bfloat16", (kv_group((0, 1), 2, 64), kv_group((2,), 2, 64, window=64)))
PROBE = 4 << 20


@pytest.mark.usefixtures("_host_tensors")
def test_no_group_of_a_pool_moves_when_it_grows() -> None:
    driver, allocator = make(1 << 30)
    pool = DevicePool(LAYOUT, (3, 3), 0, allocator, max_blocks=(1000, 2000))
    before = pool.memory()
    small = pool.tensors()
    reserved = [(len(t), t.data_ptr()) for t in pool.reserved_tensors()]
    assert driver.used <= PROBE + 2 * (64 << 10) + G
    pool.resize((1000, 900))
    after = pool.memory()
    assert [r.address for r in after.regions[:2]] == [r.address for r in before.regions[:2]]
    assert [r.num_blocks for r in after.regions[:2]] == [1000, 900]
    assert len(after.segments) == 2
    for region in after.regions:
        assert any(
            s.address <= region.address and region.address + region.size_bytes <= s.address + s.size_bytes
            for s in after.segments
        )
    assert reserved == [(LAYOUT.block_bytes(g) * n, after.regions[g].address) for g, n in enumerate((1000, 2000))]
    for number, tensor in enumerate(pool.tensors(), 1):
        assert len(tensor) == after.regions[number - 1].size_bytes
        assert not tensor.any()
        tensor.fill_(number)
    assert [set(t.tolist()) for t in small] == [{1}, {2}]  # views of before show the same addresses
    assert sum(s.size_bytes for s in after.segments) - pool.size_bytes < 2 * G
    allocator.sleep()
    allocator.wake()
    pool.clear()
    pool.close()
    pool.close()
    driver.check_clean()


@pytest.mark.usefixtures("_host_tensors")
def test_a_pool_that_cannot_grow_is_as_it_was() -> None:
    driver, allocator = make(16 << 20)
    pool = DevicePool(LAYOUT, (3, 3), 0, allocator, max_blocks=(10_000, 10_000))
    before = pool.memory().regions, pool.size_bytes
    with pytest.raises(OutOfDeviceMemory):
        pool.resize((10_000, 10_000))
    assert (pool.memory().regions, pool.size_bytes) == before
    pool.clear()
    with pytest.raises(ValueError, match="addresses are reserved for"):
        pool.resize((10_001, 3))
    pool.resize((100, 100))
    pool.close()
    with pytest.raises(OutOfDeviceMemory):
        DevicePool(LAYOUT, (3, 10_000), 0, allocator, max_blocks=(3, 10_000))
    driver.check_clean()


@pytest.mark.usefixtures("_host_tensors")
def test_a_pool_of_one_group_is_one_handle() -> None:
    driver, allocator = make(1 << 30)
    layout = KVLayout(16, "bfloat16", LAYOUT.groups[:1])
    pool = DevicePool(layout, (3,), 0, allocator, max_blocks=(1000,))
    pool.resize((1000,))
    assert len(pool.memory().segments) == 1
    pool.close()
    fixed = DevicePool(LAYOUT, (3, 3), 0, allocator)
    assert len(fixed.memory().segments) == 1
    with pytest.raises(ValueError, match="max_blocks"):
        fixed.resize((2, 2))
    fixed.close()
    driver.check_clean()
