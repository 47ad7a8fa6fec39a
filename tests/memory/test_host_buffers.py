"""Host memory for what sleeps."""

from __future__ import annotations

import ctypes
import mmap

from pd_serve.memory.driver import DriverError
from pd_serve.memory.host_buffers import HostBuffers


class Pins:
    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.pinned: dict[int, int] = {}

    def pin(self, address: int, size: int) -> None:
        if self.refuse:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        self.pinned[address] = size

    def unpin(self, address: int) -> None:
        del self.pinned[address]


def test_buffers_are_returned_in_full() -> None:
    pins = Pins()
    buffers = HostBuffers(pins)
    taken = [buffers.take(size) for size in (1, 5000, 3 << 20)]
    assert buffers.size_bytes == sum(buffer.size for buffer in taken)
    assert all(buffer.size % mmap.PAGESIZE == 0 and buffer.address % mmap.PAGESIZE == 0 for buffer in taken)
    assert pins.pinned == {buffer.address: buffer.size for buffer in taken}
    for buffer in taken:
        assert buffer.pinned
        ctypes.memset(buffer.address, 1, buffer.size)
        buffers.give(buffer)
    assert buffers.size_bytes == 0
    assert pins.pinned == {}


def test_kept_buffers_serve_the_next_sleep_and_do_not_grow() -> None:
    pins = Pins()
    buffers = HostBuffers(pins, keep=True)
    sizes = [4096, 4096, 8192]
    for _ in range(4):
        for buffer in [buffers.take(size) for size in sizes]:
            buffers.give(buffer)
        assert buffers.size_bytes == sum(sizes)
        assert len(pins.pinned) == 3
    late = buffers.take(4096)
    buffers.close()
    assert buffers.size_bytes == 4096
    buffers.give(late)
    assert buffers.size_bytes == 0
    assert pins.pinned == {}


def test_memory_that_cannot_be_pinned_serves_as_it_is() -> None:
    buffers = HostBuffers(Pins(refuse=True))
    buffer = buffers.take(100)
    assert not buffer.pinned
    ctypes.memset(buffer.address, 1, 100)
    buffers.give(buffer)
    assert not HostBuffers().take(100).pinned
