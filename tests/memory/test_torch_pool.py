"""The allocator as torch's memory pools, on a stand-in for torch's CUDA allocator that has its rules."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pd_serve.memory import alloc_conf
from pd_serve.memory.cumem import CumemAllocator, MemoryAsleep
from pd_serve.memory.host_buffers import HostBuffers
from pd_serve.memory.torch_pool import FREE, MALLOC, TorchPools
from tests.memory.memfd import GRANULARITY, MemfdDriver


class FakePool:
    def __init__(self, malloc: int, free: int) -> None:
        self.malloc, self.free = MALLOC(malloc), FREE(free)
        self.live: dict[int, int] = {}
        self.cached: dict[int, int] = {}

    def __del__(self) -> None:
        for address, size in self.cached.items():
            self.free(address, size, 0, None)


class FakeTorch:
    """What of torch 2.11's allocator matters here: pools, their thread, and the text of its settings."""

    def __init__(self, text: str = "") -> None:
        self.underway: list[tuple[FakePool, int]] = []
        self.pools: list[FakePool] = []
        self.resets = 0
        self.text = ""
        self.expandable = False
        self.split = ""
        self.configure(text)
        self.history: list[str] = []

    # what TorchPools uses

    def make_pool(self, malloc: int, free: int) -> Any:
        return FakePool(malloc, free)

    @contextlib.contextmanager
    def use_pool(self, pool: FakePool) -> Iterator[None]:
        assert pool not in [one for one, _ in self.underway], "beginAllocateToPool: already recording"
        entry = (pool, threading.get_ident())
        self.underway.append(entry)
        try:
            yield
        finally:
            self.underway.remove(entry)

    def pool_bytes(self, pool: FakePool) -> tuple[int, int]:
        live = sum(pool.live.values())
        return live, live + sum(pool.cached.values())

    def settings(self) -> tuple[str, bool]:
        return self.text, self.expandable

    def configure(self, text: str) -> None:
        pairs = dict(alloc_conf.parse(text))
        assert set(pairs) <= {"expandable_segments", "max_split_size_mb"}, "Unrecognized key"
        assert pairs.get("expandable_segments") in (None, "True", "False"), "Expected 'True' or 'False'"
        self.split = pairs.get("max_split_size_mb", "")  # reset when not named
        if "expandable_segments" in pairs:
            self.expandable = pairs["expandable_segments"] == "True"
        self.text = text
        self.history = [*getattr(self, "history", []), text]

    # what programs use

    def empty(self, size: int) -> tuple[FakePool, int] | None:
        """A tensor: its pool and address. Outside of pools: None."""
        thread = threading.get_ident()
        pool = next((pool for pool, owner in self.underway if owner == thread), None)
        if pool is None:
            return None
        assert not self.expandable
        for address, cached in pool.cached.items():
            if cached >= size:
                pool.live[address] = pool.cached.pop(address)
                return pool, address
        address = pool.malloc(size, 0, None)
        if not address:
            for one, held in list(pool.cached.items()):  # as torch does before it gives up
                pool.free(one, held, 0, None)
                del pool.cached[one]
            address = pool.malloc(size, 0, None)
        if not address:
            raise RuntimeError("CUDA out of memory")
        pool.live[address] = size
        return pool, address

    def free(self, tensor: tuple[FakePool, int] | None) -> None:
        assert tensor is not None
        pool, address = tensor
        pool.cached[address] = pool.live.pop(address)


class Rig:
    def __init__(self, text: str = "", capacity: int = 1 << 30) -> None:
        self.driver = MemfdDriver(capacity=capacity)
        self.allocator = CumemAllocator(self.driver, 0, HostBuffers())
        self.torch = FakeTorch(text)
        self.pools = TorchPools(self.allocator, self.torch)

    def tags(self) -> dict[str, int]:
        return {tag: usage.bytes for tag, usage in self.allocator.report().tags.items()}


def test_allocations_inside_belong_to_the_tag_and_frees_may_come_later() -> None:
    rig = Rig()
    assert rig.torch.empty(10) is None
    with rig.pools.use_memory_pool("weights"):
        tensor = rig.torch.empty(1000)
    assert rig.torch.empty(10) is None
    assert rig.tags() == {"weights": 1000}
    rig.torch.free(tensor)
    assert rig.tags() == {"weights": 1000}  # torch keeps it for the next
    with rig.pools.use_memory_pool("weights"):
        assert rig.torch.empty(900) == tensor
    rig.torch.free(tensor)
    del tensor
    rig.pools.close()
    gc.collect()
    assert rig.tags() == {"weights": 0}
    rig.driver.check_clean()


def test_nested_contexts_of_the_same_and_of_other_tags() -> None:
    rig = Rig()
    with rig.pools.use_memory_pool("a"):
        rig.torch.empty(1)
        with rig.pools.use_memory_pool("a"):
            rig.torch.empty(10)
        rig.torch.empty(100)
        with rig.pools.use_memory_pool("b"):
            rig.torch.empty(1000)
            with rig.pools.use_memory_pool("a"):
                rig.torch.empty(10_000)
            rig.torch.empty(2000)
        rig.torch.empty(100_000)
    assert rig.tags() == {"a": 110_111, "b": 3000}
    assert rig.torch.underway == []
    assert rig.allocator.tag == "other"


@pytest.mark.parametrize("text", ["", "max_split_size_mb:64", "expandable_segments:True,max_split_size_mb:64"])
def test_everything_is_restored_when_a_nested_body_raises(text: str) -> None:
    rig = Rig(text)
    before = rig.torch.settings()
    with rig.pools.use_memory_pool("a"):
        with pytest.raises(KeyError), rig.pools.use_memory_pool("b"):
            rig.torch.empty(1)
            raise KeyError
        assert rig.allocator.tag == "a"
        assert not rig.torch.expandable
        rig.torch.empty(10)
    assert rig.tags() == {"b": 1, "a": 10}
    assert rig.torch.settings() == before
    assert rig.torch.split == ("64" if "max_split" in text else "")
    assert rig.torch.underway == []


def test_a_context_that_cannot_begin_leaves_nothing_behind() -> None:
    rig = Rig("expandable_segments:True")
    fine = rig.torch.use_pool

    def broken(pool: FakePool) -> contextlib.AbstractContextManager[None]:
        if len(rig.pools._pools) == 2:  # b's
            raise OSError
        return fine(pool)

    rig.torch.use_pool = broken  # type: ignore[method-assign]
    with rig.pools.use_memory_pool("a"):
        with pytest.raises(OSError), rig.pools.use_memory_pool("b"):
            pass
        rig.pools._pools.pop("b")
    assert rig.torch.expandable
    assert rig.torch.underway == []
    assert rig.allocator.tag == "other"


def test_other_options_survive_switching_expandable_segments() -> None:
    rig = Rig("expandable_segments:True, max_split_size_mb:64")
    with rig.pools.use_memory_pool("a"):
        assert not rig.torch.expandable
        assert rig.torch.split == "64"
        rig.torch.configure("max_split_size_mb:128,expandable_segments:False")
    assert rig.torch.expandable
    assert rig.torch.split == "128"  # a change made inside stays


def test_expandable_segments_that_no_text_names_are_restored_too() -> None:
    rig = Rig("expandable_segments:True")
    rig.torch.configure("max_split_size_mb:64")  # torch leaves them on
    assert rig.torch.settings() == ("max_split_size_mb:64", True)
    with rig.pools.use_memory_pool("a"):
        assert not rig.torch.expandable
    assert rig.torch.expandable
    assert rig.torch.split == "64"


def test_switched_on_inside_they_are_off_again_in_a_nested_context() -> None:
    rig = Rig("expandable_segments:False")
    with rig.pools.use_memory_pool("a"):
        rig.torch.configure("expandable_segments:True")
        with rig.pools.use_memory_pool("b"):
            assert not rig.torch.expandable
    assert not rig.torch.expandable


def test_nothing_is_configured_where_they_are_off() -> None:
    rig = Rig("max_split_size_mb:64")
    with rig.pools.use_memory_pool("a"), rig.pools.use_memory_pool("b"):
        pass
    assert rig.torch.history == []


def test_two_threads_in_the_same_tag_have_a_pool_each() -> None:
    rig = Rig("expandable_segments:True")
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with rig.pools.use_memory_pool("a"):
            rig.torch.empty(10)
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with rig.pools.use_memory_pool("a"):
        rig.torch.empty(1)
    assert not rig.torch.expandable  # the other thread is still inside
    assert rig.torch.empty(5) is None
    leave.set()
    thread.join()
    assert rig.torch.expandable
    assert rig.tags() == {"a": 11}
    with rig.pools.use_memory_pool("a"), rig.pools.use_memory_pool("b"):  # idle pools are used again
        pass
    assert len(rig.pools._pools["a"]) == 2


def test_two_allocators_of_a_device_do_not_mix() -> None:
    rig = Rig()
    driver = MemfdDriver()
    allocator = CumemAllocator(driver, 0, HostBuffers())
    other = TorchPools(allocator, rig.torch)
    with rig.pools.use_memory_pool("a"):
        rig.torch.empty(1)
        with other.use_memory_pool("a"):
            tensor = rig.torch.empty(10)
        rig.torch.empty(100)
        rig.torch.free(tensor)
    assert rig.tags() == {"a": 101}
    assert allocator.report().tags["a"].bytes == 10
    del tensor
    other.close()
    gc.collect()
    driver.check_clean()


def test_out_of_memory_is_torchs_error_with_the_reason_and_the_next_works() -> None:
    rig = Rig(capacity=4 * GRANULARITY)
    with rig.pools.use_memory_pool("weights"):
        rig.torch.free(rig.torch.empty(2 * GRANULARITY))
        with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:  # noqa: SIM117
            with rig.pools.use_memory_pool("kv_cache"):
                rig.torch.empty(3 * GRANULARITY)
        assert "no 196608 bytes for 'kv_cache'" in caught.value.__notes__[0]
        assert rig.torch.empty(3 * GRANULARITY)  # what torch had cached goes first
    assert rig.tags()["weights"] == 3 * GRANULARITY


def test_memory_of_another_device_is_refused_without_an_exception_in_c() -> None:
    rig = Rig()
    malloc, free = rig.pools._callbacks.addresses
    assert not MALLOC(malloc)(100, 1, None)
    FREE(free)(12345, 100, 0, None)  # unknown: logged
    FREE(free)(None, 0, 0, None)
    rig.driver.check_clean()


def test_a_sleeping_tag_refuses_allocations_with_a_clear_error() -> None:
    rig = Rig()
    with rig.pools.use_memory_pool("weights"):
        pool, address = rig.torch.empty(100) or pytest.fail()
    ctypes.memset(address, 3, 100)
    rig.allocator.sleep(["weights"])
    with pytest.raises(MemoryAsleep, match="'weights' is asleep"), rig.pools.use_memory_pool("weights"):
        pytest.fail("the body must not run")
    rig.allocator.wake()
    assert ctypes.string_at(address, 100) == b"\3" * 100
    with rig.pools.use_memory_pool("weights"):
        assert rig.torch.empty(100)
    rig.torch.free((pool, address))


def test_fragmentation_counts_what_torch_keeps_for_later() -> None:
    rig = Rig()
    with rig.pools.use_memory_pool("weights"):
        tensors = [rig.torch.empty(GRANULARITY) for _ in range(4)]
    rig.torch.free(tensors[0])
    report = rig.pools.report()
    assert report.device == "cuda:0"
    assert report.fragmentation == 0.25
    assert report.tags["weights"].reserved_bytes == 4 * GRANULARITY


def test_pools_of_living_tensors_stay() -> None:
    rig = Rig()
    with rig.pools.use_memory_pool("weights"):
        pool, address = rig.torch.empty(100) or pytest.fail()
    with rig.pools.use_memory_pool("kv_cache"):
        rig.torch.free(rig.torch.empty(100))
    rig.pools.close()
    gc.collect()
    assert rig.tags() == {"weights": 100, "kv_cache": 0}
    ctypes.memset(address, 1, 100)
    rig.pools.close()  # idempotent
    rig.torch.free((pool, address))


def test_the_end_of_the_interpreter_calls_nothing_that_is_gone() -> None:
    script = """
from tests.memory.test_torch_pool import Rig
rig = Rig()
with rig.pools.use_memory_pool("weights"):
    tensor = rig.torch.empty(100)
with rig.pools.use_memory_pool("kv_cache"):
    rig.torch.free(rig.torch.empty(100))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
