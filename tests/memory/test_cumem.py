"""The allocator's books, on host memory that stands for a device's (tests/memory/memfd.py)."""

from __future__ import annotations

import ctypes
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.memory.cumem import UNTAGGED, CumemAllocator, MemoryAsleep, OutOfDeviceMemory
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind
from pd_serve.memory.host_buffers import HostBuffers
from tests.memory.memfd import GRANULARITY, NOT_PERMITTED, OUT_OF_MEMORY, MemfdDriver

KIB = 1 << 10


def make(driver: MemfdDriver, host: HostBuffers | None = None) -> CumemAllocator:
    return CumemAllocator(driver, 0, host or HostBuffers())


def fill(address: int, size: int, value: int) -> None:
    ctypes.memset(address, value, size)


def content(address: int, size: int) -> set[int]:
    return set(ctypes.string_at(address, size))


# handle types


def test_the_farthest_reaching_handles_are_taken() -> None:
    allocator = make(MemfdDriver(rdma=True))
    assert allocator.kind == MemoryKind(0, HandleType.FABRIC, True)


@pytest.mark.parametrize("code", [NOT_PERMITTED, "CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_UNKNOWN", OUT_OF_MEMORY])
def test_fabric_falls_back_whatever_the_refusal_says(code: str) -> None:
    driver = MemfdDriver(refuse={HandleType.FABRIC: code})
    allocator = make(driver)
    assert allocator.kind == MemoryKind(0, HandleType.POSIX_FD, False)
    address = allocator.malloc(5)
    (segment,) = allocator.segments()
    assert segment.handle_type is HandleType.POSIX_FD
    assert segment.size_bytes == GRANULARITY
    allocator.free(address)
    driver.check_clean()


def test_handles_that_cannot_be_exported_are_none() -> None:
    driver = MemfdDriver(refuse={HandleType.FABRIC: NOT_PERMITTED})
    driver.fail("export_fd", NOT_PERMITTED)
    allocator = make(driver)
    assert allocator.kind.handle_type is HandleType.NONE
    driver.check_clean()


def test_rdma_falls_back_before_the_handle_type_does() -> None:
    driver = MemfdDriver(rdma=True, refuse_rdma="CUDA_ERROR_INVALID_VALUE")
    assert make(driver).kind == MemoryKind(0, HandleType.FABRIC, False)
    driver = MemfdDriver(rdma=False)
    assert make(driver).kind == MemoryKind(0, HandleType.FABRIC, False)


def test_granularity_is_that_of_the_very_kind() -> None:
    driver = MemfdDriver(
        rdma=True,
        refuse={HandleType.FABRIC: NOT_PERMITTED},
        granularities={(HandleType.POSIX_FD, True): 512 * KIB},
    )
    allocator = make(driver)
    address = allocator.malloc(1)  # the driver refuses other multiples
    assert allocator.segment_of(address).size_bytes == 512 * KIB
    assert address % (512 * KIB) == 0


def test_a_full_device_is_probed_again_when_it_is_not() -> None:
    driver = MemfdDriver(capacity=0)
    allocator = make(driver)
    with pytest.raises(OutOfDeviceMemory, match="no memory left"):
        allocator.malloc(1)
    driver.capacity = 1 << 30
    assert allocator.malloc(1)
    assert allocator.kind.handle_type is HandleType.FABRIC


def test_a_refusal_of_every_kind_is_said() -> None:
    driver = MemfdDriver(refuse=dict.fromkeys(HandleType, NOT_PERMITTED))
    with pytest.raises(DriverError, match=NOT_PERMITTED):
        make(driver).malloc(1)
    driver.check_clean()


# failures


def test_running_out_of_memory_poisons_nothing() -> None:
    driver = MemfdDriver(capacity=4 * GRANULARITY)
    allocator = make(driver)
    first = allocator.malloc(3 * GRANULARITY)
    for _ in range(3):
        with pytest.raises(OutOfDeviceMemory, match=r"131072 bytes for 'other'; 65536 of 262144 bytes are free"):
            allocator.malloc(2 * GRANULARITY)
    assert (driver.live_handles, driver.live_reservations) == (1, 1)
    second = allocator.malloc(GRANULARITY)
    allocator.free(first)
    third = allocator.malloc(2 * GRANULARITY)
    fill(third, 2 * GRANULARITY, 7)
    allocator.free(second)
    allocator.free(third)
    driver.check_clean()


@pytest.mark.parametrize("call", ["reserve", "create", "map"])
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, "CUDA_ERROR_UNKNOWN"])
def test_a_failed_allocation_leaves_nothing(call: str, code: str) -> None:
    driver = MemfdDriver()
    allocator = make(driver)
    assert allocator.kind  # probed before faults begin
    driver.fail(call, code)
    expected = OutOfDeviceMemory if (call, code) == ("create", OUT_OF_MEMORY) else DriverError
    with pytest.raises(expected):
        allocator.malloc(100)
    driver.check_clean()
    report = allocator.report()
    assert all((tag.bytes, tag.reserved_bytes) == (0, 0) for tag in report.tags.values())
    address = allocator.malloc(100)
    fill(address, 100, 1)
    allocator.free(address)
    driver.check_clean()


def test_what_was_not_allocated_cannot_be_freed() -> None:
    driver = MemfdDriver()
    allocator, other = make(driver), make(driver)
    address = allocator.malloc(100)
    for wrong in (0, address + 1):
        with pytest.raises(ValueError, match="not allocated here"):
            allocator.free(wrong)
    with pytest.raises(ValueError, match="not allocated here"):
        other.free(address)
    allocator.free(address)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(address)
    with pytest.raises(ValueError, match="0 bytes"):
        allocator.malloc(0)
    driver.check_clean()


def test_memory_that_cannot_be_unmapped_is_still_allocated() -> None:
    driver = MemfdDriver()
    allocator = make(driver)
    address = allocator.malloc(100)
    for call in ("synchronize", "unmap"):
        driver.fail(call, "CUDA_ERROR_ILLEGAL_ADDRESS")
        with pytest.raises(DriverError):
            allocator.free(address)
        assert allocator.segment_of(address)
    allocator.free(address)
    assert driver.synchronized == 2
    driver.check_clean()


# tags


def test_tags_nest_and_are_restored_when_a_body_raises() -> None:
    allocator = make(MemfdDriver())
    assert allocator.tag == UNTAGGED
    with allocator.tagged("weights"):
        with pytest.raises(KeyError), allocator.tagged("kv_cache"), allocator.tagged("weights"):
            assert allocator.tag == "weights"
            raise KeyError
        assert allocator.tag == "weights"
        with allocator.tagged("kv_cache"):
            assert allocator.tag == "kv_cache"
        assert allocator.tag == "weights"
    assert allocator.tag == UNTAGGED


def test_a_tag_is_its_threads_own() -> None:
    allocator = make(MemfdDriver())
    seen = []
    with allocator.tagged("weights"):
        thread = threading.Thread(target=lambda: seen.append((allocator.tag, allocator.malloc(1))))
        thread.start()
        thread.join()
        allocator.malloc(2)
    assert seen[0][0] == UNTAGGED
    assert {tag: usage.bytes for tag, usage in allocator.report().tags.items()} == {UNTAGGED: 1, "weights": 2}


def test_usage_is_counted_by_the_tag_of_the_allocation() -> None:
    driver = MemfdDriver()
    allocator = make(driver)
    with allocator.tagged("weights"):
        one = allocator.malloc(GRANULARITY)
        two = allocator.malloc(GRANULARITY // 2)
        with allocator.tagged("kv_cache"):
            three = allocator.malloc(3 * GRANULARITY)
            allocator.free(one)  # inside of another tag's context
    allocator.free(three)  # outside of any
    tags = allocator.report().tags
    assert (tags["weights"].bytes, tags["weights"].peak_bytes) == (GRANULARITY // 2, GRANULARITY * 3 // 2)
    assert tags["weights"].reserved_bytes == GRANULARITY
    assert (tags["kv_cache"].bytes, tags["kv_cache"].peak_bytes) == (0, 3 * GRANULARITY)
    assert allocator.report().fragmentation == 0.5
    assert allocator.report({"weights": GRANULARITY // 4}).fragmentation == 0.75
    assert [s.address for s in allocator.segments("weights")] == [two]
    assert allocator.segments("kv_cache") == []
    allocator.free(two)
    assert allocator.report().fragmentation == 0.0
    driver.check_clean()


def test_two_allocators_do_not_mix() -> None:
    driver = MemfdDriver()
    one, two = make(driver), make(driver)
    with one.tagged("weights"):
        assert two.tag == UNTAGGED
        first, second = one.malloc(10), two.malloc(20)
    assert [s.address for s in one.segments()] == [first]
    assert [s.address for s in two.segments()] == [second]
    one.sleep()
    assert two.asleep == []
    two.free(second)
    one.close()
    driver.check_clean()


def test_the_segment_of_an_address() -> None:
    allocator = make(MemfdDriver())
    addresses = [allocator.malloc(GRANULARITY) for _ in range(3)]
    for address in addresses:
        assert allocator.segment_of(address + GRANULARITY - 1).address == address
    with pytest.raises(ValueError, match="not memory of this allocator"):
        allocator.segment_of(1)


# sleep


def test_sleep_keeps_what_it_is_told_to_at_the_same_addresses() -> None:
    driver = MemfdDriver(refuse={HandleType.FABRIC: NOT_PERMITTED})
    host = HostBuffers()
    allocator = make(driver, host)
    with allocator.tagged("weights"):
        weights = [allocator.malloc(100_000) for _ in range(3)]
    with allocator.tagged("kv_cache"):
        cache = allocator.malloc(200_000)
    for number, address in enumerate(weights):
        fill(address, 100_000, number + 1)
    before = {s.address: s.handle for s in allocator.segments()}

    allocator.sleep(["weights"])
    assert driver.used == 0
    assert driver.live_mappings == 0
    assert allocator.segments() == []
    assert allocator.asleep == ["weights", "kv_cache"]
    assert host.size_bytes >= 300_000
    report = allocator.report()
    assert report.asleep == ["weights", "kv_cache"]
    assert {usage.reserved_bytes for usage in report.tags.values()} == {0}
    for tag in ("weights", "kv_cache"):
        with allocator.tagged(tag), pytest.raises(MemoryAsleep, match="wake it before"):
            allocator.malloc(1)

    allocator.wake(["weights"])
    assert allocator.asleep == ["kv_cache"]
    assert [content(address, 100_000) for address in weights] == [{1}, {2}, {3}]
    with allocator.tagged("weights"):
        allocator.free(allocator.malloc(1))
    with pytest.raises(ValueError, match="asleep"):
        allocator.segment_of(cache)

    allocator.wake()
    assert allocator.asleep == []
    after = {s.address: s.handle for s in allocator.segments()}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())  # what was exported before is of no use now
    assert host.size_bytes == 0
    allocator.close()
    driver.check_clean()


def test_a_deeper_sleep_drops_what_the_first_one_kept() -> None:
    driver = MemfdDriver()
    host = HostBuffers()
    allocator = make(driver, host)
    with allocator.tagged("weights"):
        address = allocator.malloc(100)
    fill(address, 100, 5)
    allocator.sleep(["weights"])
    allocator.sleep(["weights"])
    assert host.size_bytes
    allocator.sleep()
    assert host.size_bytes == 0
    allocator.wake()
    assert content(address, 100) != {5}


def test_what_sleeps_can_be_freed() -> None:
    driver = MemfdDriver()
    host = HostBuffers()
    allocator = make(driver, host)
    address = allocator.malloc(100)
    allocator.sleep([UNTAGGED])
    allocator.free(address)
    assert host.size_bytes == 0
    assert allocator.asleep == []
    driver.check_clean()


def test_a_copy_that_fails_leaves_everything_awake() -> None:
    driver = MemfdDriver()
    host = HostBuffers()
    allocator = make(driver, host)
    addresses = [allocator.malloc(100) for _ in range(3)]
    for address in addresses:
        fill(address, 100, 9)
    driver.fail("copy_to_host", "", "CUDA_ERROR_UNKNOWN")
    with pytest.raises(DriverError):
        allocator.sleep([UNTAGGED])
    assert allocator.asleep == []
    assert host.size_bytes == 0
    assert [content(address, 100) for address in addresses] == [{9}] * 3
    allocator.sleep([UNTAGGED])
    allocator.wake()
    assert [content(address, 100) for address in addresses] == [{9}] * 3


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_sleep_that_fails_half_way_says_what_sleeps(call: str) -> None:
    driver = MemfdDriver()
    host = HostBuffers()
    allocator = make(driver, host)
    addresses = {}
    for number, tag in enumerate(("a", "b", "c")):
        with allocator.tagged(tag):
            addresses[tag] = allocator.malloc(100)
        fill(addresses[tag], 100, number + 1)
    driver.fail(call, "", "CUDA_ERROR_UNKNOWN")
    with pytest.raises(DriverError):
        allocator.sleep(["a", "b", "c"])
    assert allocator.asleep == (["a", "c"] if call == "unmap" else ["a", "b", "c"])
    allocator.sleep(["a", "b", "c"])
    assert allocator.asleep == ["a", "b", "c"]
    allocator.wake()
    assert [content(address, 100) for address in addresses.values()] == [{1}, {2}, {3}]
    assert host.size_bytes == 0
    allocator.close()
    driver.check_clean()


@pytest.mark.parametrize("call", ["create", "map", "copy_to_device"])
def test_waking_that_fails_can_be_tried_again(call: str) -> None:
    driver = MemfdDriver()
    host = HostBuffers()
    allocator = make(driver, host)
    addresses = {}
    for number, tag in enumerate(("a", "b", "c")):
        with allocator.tagged(tag):
            addresses[tag] = allocator.malloc(100)
        fill(addresses[tag], 100, number + 1)
    allocator.sleep(["a", "b", "c"])
    for _ in range(2):
        driver.fail(call, *([""] if allocator.asleep[0] == "a" else []), OUT_OF_MEMORY)
        with pytest.raises(OutOfDeviceMemory if call == "create" else DriverError):
            allocator.wake()
        assert allocator.asleep == ["b", "c"]
        assert [s.address for s in allocator.segments()] == [addresses["a"]]
        assert driver.used == GRANULARITY  # what failed holds nothing
        assert allocator.report().tags["b"].reserved_bytes == 0
        with allocator.tagged("b"), pytest.raises(MemoryAsleep):
            allocator.malloc(1)
    allocator.wake()
    assert [content(address, 100) for address in addresses.values()] == [{1}, {2}, {3}]
    allocator.close()
    driver.check_clean()
    assert host.size_bytes == 0


def test_allocations_of_other_tags_go_on_while_one_sleeps() -> None:
    allocator = make(MemfdDriver())
    with allocator.tagged("weights"):
        allocator.malloc(100)
    allocator.sleep()
    assert allocator.malloc(100)
    assert allocator.asleep == ["weights"]


def test_many_threads_allocate_and_free() -> None:
    driver = MemfdDriver()
    allocator = make(driver)
    failures: list[BaseException] = []

    def work(tag: str) -> None:
        try:
            with allocator.tagged(tag):
                for _ in range(50):
                    addresses = [allocator.malloc(100) for _ in range(3)]
                    for address in addresses:
                        fill(address, 100, 1)
                        allocator.free(address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"tag{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {usage.bytes for usage in allocator.report().tags.values()} == {0}
    driver.check_clean()


TAGS = ("weights", "kv_cache", "scratch")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), st.sampled_from(TAGS), st.integers(1, 3 * GRANULARITY)),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("resize"), st.integers(0, 50), st.integers(1, 5), st.integers(1, 5 * GRANULARITY)),
        st.tuples(st.just("sleep"), st.sets(st.sampled_from(TAGS))),
        st.tuples(st.just("wake"), st.none() | st.sets(st.sampled_from(TAGS))),
        st.tuples(
            st.just("fail"),
            st.sampled_from(["reserve", "create", "map", "unmap", "release", "copy_to_host", "copy_to_device"]),
            st.integers(0, 2),
            st.sampled_from([OUT_OF_MEMORY, NOT_PERMITTED]),
        ),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.booleans())
def test_any_sequence_keeps_content_and_leaks_nothing(sequence: list[tuple], keep_buffers: bool) -> None:
    """Against a model of what each address holds; None: dropped by a sleep, or by one that failed."""
    driver = MemfdDriver(capacity=24 * GRANULARITY)
    host = HostBuffers(keep=keep_buffers)
    allocator = make(driver, host)
    assert allocator.kind
    model: dict[int, tuple[str, int, int | None]] = {}
    value = 0
    lossy = any(step[0] == "fail" and step[1] in ("unmap", "release") for step in sequence)
    for step in sequence:
        if step[0] == "malloc":
            value = value % 250 + 1
            _, tag, size = step
            try:
                with allocator.tagged(tag):
                    address = allocator.malloc(size, reserve=4 * GRANULARITY)
            except (OutOfDeviceMemory, MemoryAsleep, DriverError):
                pass
            else:
                assert address not in model
                assert tag not in allocator.asleep
                fill(address, size, value)
                model[address] = (tag, size, value)
        elif step[0] == "free" and model:
            address = sorted(model)[step[1] % len(model)]
            try:
                allocator.free(address)
            except DriverError:
                if driver.is_mapped(address):
                    continue
            del model[address]
        elif step[0] == "resize" and model:
            first = step[1] % len(model)
            chosen = sorted(model)[first : first + step[2]]
            try:
                allocator.resize(dict.fromkeys(chosen, step[3]))
            except (ValueError, MemoryAsleep):  # more than was reserved; nothing has changed
                assert step[3] > 4 * GRANULARITY or {model[address][0] for address in chosen} & set(allocator.asleep)
            except (OutOfDeviceMemory, DriverError):
                for address in chosen:
                    model[address] = (*model[address][:2], None)
            else:
                for address in chosen:
                    value = value % 250 + 1
                    fill(address, step[3], value)
                    model[address] = (model[address][0], step[3], value)
        elif step[0] == "sleep":
            already = set(allocator.asleep)
            try:
                allocator.sleep(step[1])
            except (DriverError, OSError):
                pass
            else:
                assert driver.live_mappings == 0
                assert set(allocator.asleep) == {tag for tag, _, _ in model.values()}
                if not keep_buffers:
                    assert (host.size_bytes > 0) <= any(tag in step[1] for tag, _, _ in model.values())
            slept = {address for address in model if not driver.is_mapped(address)}
            if slept or already != set(allocator.asleep):
                for address in slept:
                    tag, size, _ = model[address]
                    if tag not in step[1]:
                        model[address] = (tag, size, None)
        elif step[0] == "wake":
            try:
                allocator.wake(step[1])
            except (OutOfDeviceMemory, DriverError):
                pass
            else:
                assert not set(allocator.asleep) & (set(TAGS) if step[1] is None else step[1])
        elif step[0] == "fail":
            driver.fail(step[1], *[""] * step[2], step[3])
        asleep = set(allocator.asleep)
        for address, (tag, size, expected) in model.items():
            if driver.is_mapped(address) and expected is not None:
                assert content(address, size) == {expected}
            if tag not in asleep:
                assert driver.is_mapped(address)
        report = allocator.report()
        for tag, usage in report.tags.items():
            assert usage.bytes == sum(size for owner, size, _ in model.values() if owner == tag)
            assert usage.peak_bytes >= usage.bytes
        # released handles apart, that a fault kept: what is counted is what there is
        assert sum(usage.reserved_bytes for usage in report.tags.values()) == driver.used
        if not lossy:  # what the driver did not take back is lost, and nothing else
            assert driver.live_reservations == len(model)
            assert driver.live_handles == driver.live_mappings == sum(map(driver.is_mapped, model))
    driver.fail_next.clear()
    driver.capacity = 1 << 40
    allocator.wake()
    for address, (_, size, expected) in model.items():
        if expected is not None:
            assert content(address, size) == {expected}
    allocator.close()
    host.close()
    assert host.size_bytes == 0
    if not lossy:
        driver.check_clean()
