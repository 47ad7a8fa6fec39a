"""The cumem allocator on a real GPU: the CUDA driver, torch's pools, sleep at the same addresses."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory import alloc_conf
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.cumem import CumemAllocator, MemoryAsleep, OutOfDeviceMemory
from pd_serve.memory.device_pool import DevicePool, tensor_at
from pd_serve.memory.driver import HandleType
from pd_serve.memory.host_buffers import HostBuffers
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS
from pd_serve.memory.sleep import DeviceMemory
from pd_serve.memory.switches import cumem_unavailable_because
from pd_serve.memory.torch_pool import CudaMemory, TorchPools
from pd_serve.memory.usage import WEIGHTS

MIB = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def driver() -> CudaDriver:
    return CudaDriver()


@pytest.fixture
def allocator(driver: CudaDriver) -> Iterator[CumemAllocator]:
    made = CumemAllocator(driver, 0, HostBuffers(driver))
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    made = DeviceMemory(0, pin=should_pin_memory(True, 0))
    yield made
    gc.collect()
    made.close()


def empty(mib: int, value: int) -> torch.Tensor:
    return torch.full((mib * MIB,), value, dtype=torch.uint8, device="cuda:0")


def bytes_of(memory: DeviceMemory) -> dict[str, int]:
    return {tag: usage.bytes for tag, usage in memory.report().tags.items()}


def set_settings(text: str) -> None:
    torch._C._accelerator_setAllocatorSettings(text)


# the driver


def test_facts(driver: CudaDriver) -> None:
    facts = driver.device_facts(0)
    assert driver.device_count() == torch.cuda.device_count()
    assert facts.name == torch.cuda.get_device_name(0)
    assert facts.compute_capability == torch.cuda.get_device_capability(0)
    assert facts.total_bytes >= torch.cuda.get_device_properties(0).total_memory
    assert facts.virtual_memory
    assert float(driver.version()) >= 12.0
    assert cumem_unavailable_because() == ""
    assert cumem_unavailable_because(driver.device_count())


def test_memory_is_allocated_exported_and_imported(driver: CudaDriver, allocator: CumemAllocator) -> None:
    address = allocator.malloc(3 * MIB)
    torch.cuda.init()
    tensor = tensor_at(address, 3 * MIB, 0)
    assert tensor.data_ptr() == address
    tensor.fill_(7)
    segment = allocator.segment_of(address)
    assert segment.size_bytes >= 3 * MIB
    if segment.handle_type is HandleType.NONE:
        pytest.skip("this machine permits no handles")
    if segment.handle_type is HandleType.FABRIC:
        handle = driver.import_fabric(driver.export_fabric(segment.handle))
    else:
        fd = driver.export_fd(segment.handle)
        handle = driver.import_fd(fd)
        os.close(fd)
    window = driver.reserve(segment.size_bytes, driver.granularity(allocator.kind))
    driver.map(window, segment.size_bytes, handle, 0)
    torch.cuda.synchronize()
    assert int(tensor_at(window, 3 * MIB, 0).min()) == 7
    driver.unmap(window, segment.size_bytes)
    driver.free_address(window, segment.size_bytes)
    driver.release(handle)


def test_contexts_of_torch_are_left_alone(driver: CudaDriver, allocator: CumemAllocator) -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        allocator.free(allocator.malloc(MIB))
        assert torch.cuda.current_device() == last
        assert torch.ones(1, device="cuda").device.index == last
    addresses: list[int] = []
    thread = threading.Thread(target=lambda: addresses.append(allocator.malloc(MIB)))  # no context there
    thread.start()
    thread.join()
    allocator.free(addresses[0])


def test_freed_memory_is_the_devices_again(driver: CudaDriver, allocator: CumemAllocator) -> None:
    allocator.free(allocator.malloc(MIB))
    free = driver.memory_info(0)[0]
    address = allocator.malloc(1024 * MIB)
    assert free - driver.memory_info(0)[0] >= 1024 * MIB
    allocator.free(address)
    assert abs(free - driver.memory_info(0)[0]) < 64 * MIB


# torch's pools


def test_a_pools_tensors_belong_to_its_tag(memory: DeviceMemory) -> None:
    outside = empty(64, 1)
    with memory.use_memory_pool("weights"):
        inside = empty(64, 2)
    assert bytes_of(memory)["weights"] == 64 * MIB
    assert memory.allocator.segment_of(inside.data_ptr())
    with pytest.raises(ValueError, match="not memory of this allocator"):
        memory.allocator.segment_of(outside.data_ptr())
    assert int((inside - outside).max()) == 1
    del inside
    with memory.use_memory_pool("weights"):
        again = empty(64, 3)  # from what torch kept
    assert bytes_of(memory)["weights"] == 64 * MIB
    assert int(again[5]) == 3


def test_contexts_nest_and_survive_exceptions(memory: DeviceMemory) -> None:
    kept = []
    with memory.use_memory_pool("a"):
        kept.append(empty(32, 1))
        with memory.use_memory_pool("a"):
            kept.append(empty(32, 2))
        with pytest.raises(KeyError), memory.use_memory_pool("b"):
            kept.append(empty(128, 3))
            with memory.use_memory_pool("a"):
                kept.append(empty(32, 4))
            kept.append(empty(128, 5))
            raise KeyError
        kept.append(empty(32, 6))
    kept.append(empty(32, 7))
    assert bytes_of(memory) == {"a": 128 * MIB, "b": 256 * MIB}
    assert [int(tensor[0]) for tensor in kept] == [1, 2, 3, 4, 5, 6, 7]
    assert memory.allocator.tag == "other"


def test_two_threads_and_two_allocators(memory: DeviceMemory) -> None:
    other = DeviceMemory(0, pin=False)
    kept: list[torch.Tensor] = []
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with memory.use_memory_pool("a"):
            kept.append(empty(32, 1))
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    with memory.use_memory_pool("a"):
        kept.append(empty(64, 2))
        with other.use_memory_pool("a"):
            kept.append(empty(128, 3))
        kept.append(empty(64, 4))
    leave.set()
    thread.join()
    assert bytes_of(memory) == {"a": 160 * MIB}
    assert bytes_of(other) == {"a": 128 * MIB}
    kept.clear()
    gc.collect()
    other.close()
    assert other.allocator.segments() == []


def test_pools_give_their_memory_back_when_closed() -> None:
    memory = DeviceMemory(0, pin=False)
    with memory.use_memory_pool("weights"):
        tensor = empty(64, 1)
    del tensor
    memory.close()
    assert memory.allocator.segments() == []


@pytest.mark.parametrize("text", ["expandable_segments:True,max_split_size_mb:64", "max_split_size_mb:64"])
def test_expandable_segments_are_off_inside_and_restored(memory: DeviceMemory, text: str) -> None:
    torch_memory = CudaMemory(0)
    before = torch_memory.settings()
    on = alloc_conf.has_expandable_segments(text)
    try:
        set_settings(text)
        assert torch_memory.settings() == (text, on)
        with memory.use_memory_pool("a"):
            assert not torch_memory.settings()[1]
            with pytest.raises(KeyError), memory.use_memory_pool("b"):
                assert not torch_memory.settings()[1]
                tensor = empty(32, 1)
                raise KeyError
            assert not torch_memory.settings()[1]
        assert torch_memory.settings() == (text, on)
        assert memory.allocator.segment_of(tensor.data_ptr())
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        assert settings["max_split_size"] == 64 * MIB
    finally:
        set_settings(alloc_conf.with_expandable_segments(*before))


def test_out_of_memory_and_then_success(driver: CudaDriver, memory: DeviceMemory) -> None:
    free = driver.memory_info(0)[0]
    with pytest.raises(torch.OutOfMemoryError) as caught, memory.use_memory_pool("kv_cache"):
        torch.empty(free + (1 << 30), dtype=torch.uint8, device="cuda:0")
    assert "for 'kv_cache'" in "".join(caught.value.__notes__)
    with memory.use_memory_pool("kv_cache"):
        tensor = empty(64, 9)
    assert int(tensor[-1]) == 9
    with pytest.raises(OutOfDeviceMemory):
        memory.allocator.malloc(free + (1 << 30))
    assert bytes_of(memory)["kv_cache"] == 64 * MIB


# sleep


def layout() -> KVLayout:
    return KVLayout(16, "bfloat16", (kv_group((0, 1), 8, 128), kv_group((2,), 8, 128, window=64)))


def test_a_kv_pool_is_one_segment(memory: DeviceMemory) -> None:
    pool = memory.kv_pool(layout(), (100, 50))
    described = pool.memory()
    assert described.device == 0
    (segment,) = described.segments
    assert len(described.regions) == 3
    assert described.regions[-1].size_bytes == PROBE_BLOCK_BYTES * PROBE_BLOCKS
    for region in described.regions:
        assert region.address % 4096 == 0
        assert segment.address <= region.address
        assert region.address + region.size_bytes <= segment.address + segment.size_bytes
    assert [len(tensor) for tensor in pool.tensors()] == [region.size_bytes for region in described.regions[:-1]]
    assert all(int(tensor.max()) == 0 for tensor in pool.tensors())
    plain = DevicePool(layout(), (100, 50), 0, None)
    assert plain.memory().segments == ()
    plain.close()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_at_the_same_addresses(driver: CudaDriver, memory: DeviceMemory, level: int) -> None:
    with memory.use_memory_pool("weights"):
        weights = [torch.randint(256, (40 * MIB + 7,), dtype=torch.uint8, device="cuda:0") for _ in range(3)]
        small = torch.arange(1000, device="cuda:0")
    sums = [int(tensor.long().sum()) for tensor in weights]
    pool = memory.kv_pool(layout(), (2000, 2000))
    pool.tensors()[0].fill_(5)
    addresses = [tensor.data_ptr() for tensor in [*weights, small]]
    before = pool.memory()
    total = sum(usage.reserved_bytes for usage in memory.report().tags.values())
    free = driver.memory_info(0)[0]

    for _ in range(3):
        memory.sleep(level)
        assert driver.memory_info(0)[0] - free >= total - 64 * MIB
        assert sorted(memory.asleep) == ["kv_cache", "weights"]
        assert memory.report().asleep == memory.asleep
        with pytest.raises(MemoryAsleep), memory.use_memory_pool("weights"):
            pytest.fail("the body must not run")
        memory.wake(["weights"])
        assert memory.asleep == ["kv_cache"]
        if level == 1:
            assert [int(tensor.long().sum()) for tensor in weights] == sums
            assert torch.equal(small.cpu(), torch.arange(1000))
        else:
            for tensor in weights:
                tensor.fill_(1)
        memory.wake()
        assert memory.asleep == []
        assert [tensor.data_ptr() for tensor in [*weights, small]] == addresses
        after = pool.memory()
        assert after.regions == before.regions
        assert after.segments[0].address == before.segments[0].address
        assert int(pool.tensors()[0].max()) == 0
        pool.tensors()[0].fill_(5)
        assert abs(driver.memory_info(0)[0] - free) < 64 * MIB


def test_waking_without_room_can_be_tried_again(driver: CudaDriver, memory: DeviceMemory) -> None:
    with memory.use_memory_pool("weights"):
        weights = [empty(512, number) for number in (1, 2, 3, 4)]
    memory.sleep(1)
    torch.cuda.empty_cache()
    other = CumemAllocator(driver, 0, HostBuffers())
    hog = other.malloc(driver.memory_info(0)[0] - 1400 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        memory.wake()
    assert memory.asleep == ["weights"]
    other.free(hog)
    memory.wake()
    assert memory.asleep == []
    assert [(int(tensor.min()), int(tensor.max())) for tensor in weights] == [(n, n) for n in (1, 2, 3, 4)]


def test_a_cuda_graph_replays_after_waking(memory: DeviceMemory) -> None:
    with memory.use_memory_pool("weights"):
        weight = torch.randn(512, 512, device="cuda:0")
    source = torch.randn(8, 512, device="cuda:0")
    stream = torch.cuda.Stream(device=0)
    with torch.cuda.stream(stream):
        source @ weight  # warms the library up
    torch.cuda.synchronize(0)
    graph = torch.cuda.CUDAGraph()
    # torch's own capture stream belongs to whatever device was current when it was first needed
    with torch.cuda.device(0), torch.cuda.graph(graph, stream=stream):
        result = source @ weight
    graph.replay()
    torch.cuda.synchronize()
    expected = result.clone()
    memory.sleep(1)
    memory.wake()
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


# the end


def test_the_end_of_the_interpreter_with_tensors_alive() -> None:
    script = """
import torch
from pd_serve.memory.sleep import DeviceMemory
memory = DeviceMemory(0, pin=False)
with memory.use_memory_pool("weights"):
    kept = torch.ones(1 << 20, device="cuda:0")
    gone = torch.ones(1 << 24, device="cuda:0")
del gone
pool = torch.cuda.CUDAGraph()
print(int(kept.sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1048576\n", "")


def test_pools_of_an_allocator_alone(allocator: CumemAllocator) -> None:
    pools = TorchPools(allocator)
    with pools.use_memory_pool("weights"):
        tensors = [empty(32, 1) for _ in range(4)]
    tensors.pop()
    report = pools.report()
    assert report.device == "cuda:0"
    assert report.tags["weights"].reserved_bytes == 128 * MIB
    assert report.fragmentation == pytest.approx(0.25)
    tensors.clear()
    pools.close()
    assert allocator.segments() == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_sleep_of_another_device_than_the_first(current: int) -> None:
    with torch.cuda.device(current):
        memory = DeviceMemory(1, pin=should_pin_memory(True, 1))
        with memory.use_memory_pool(WEIGHTS):
            small = torch.arange(1000, device="cuda:1")
            large = torch.arange(3 * MIB, device="cuda:1")
        for _ in range(2):
            memory.sleep(1)
            memory.wake()
            assert small.equal(torch.arange(1000, device="cuda:1"))
            assert large.equal(torch.arange(3 * MIB, device="cuda:1"))
        del small, large
        gc.collect()
        memory.close()
