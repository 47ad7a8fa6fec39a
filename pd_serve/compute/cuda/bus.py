"""What weights in the host's memory need of a GPU: registered memory, its address there, and copies on a stream beside.

A :class:`pd_serve.compute.cuda.offload.Bus`. Computing is on the current stream, copies on one of their own; an event
of each slot says when it has arrived, another when it is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.errors import PDServeError
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.host_buffers import HostBuffer

COPY_BYTES = 32 << 20  # of one copy; smaller ones cost up to 8%, and leave KV from the host no turn on the bus either
_MEASURED_BYTES = 512 << 20
_RUNS = 4


class CudaBus:
    """``pin``: see :func:`pd_serve.memory.pinned.should_pin_memory`. Without it copies are slow, and wait."""

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self._device = device
        self._pin = pin
        self._driver = CudaDriver()
        self._driver.synchronize(device.index or 0)  # opens its context, for what follows
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[Tensor] = []
        self._arrived: list[torch.cuda.Event] = []
        self._left: list[torch.cuda.Event] = []

    def buffer(self, size: int) -> HostBuffer:
        return HostBuffer(size, self._driver if self._pin else None)

    def mapped(self, buffer: HostBuffer) -> Tensor:
        address = buffer.address
        if buffer.pinned:
            address = self._driver.device_address(buffer.address)
        elif not self._driver.device_facts(self._device.index or 0).host_page_tables:
            raise PDServeError(
                "--weight-offload uva: host memory for weights cannot be registered, so that GPUs could read it; raise "
                "the limit of locked memory (ulimit -l), or use --weight-offload prefetch"
            )
        storage = torch._C._construct_storage_from_data_pointer(address, self._device, buffer.size)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage, 0, (buffer.size,), (1,))

    def add_slot(self, size: int) -> Tensor:
        self._slots.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        self._arrived.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        self._left.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        return self._slots[-1]

    @torch.inference_mode()
    def copy(self, slot: int, source: Tensor) -> None:
        target = self._slots[slot]
        self._stream.wait_event(self._left[slot])
        with torch.cuda.stream(self._stream):
            for at in range(0, len(source), COPY_BYTES):
                part = source[at : at + COPY_BYTES]
                target[at : at + len(part)].copy_(part, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def leave(self, slot: int) -> None:
        self._left[slot].record(torch.cuda.current_stream(self._device))

    def copy_rate(self, source: Tensor, slot: int) -> float:
        part = source[:_MEASURED_BYTES]
        times = []
        for _ in range(_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)
            start.record(self._stream)
            self.copy(slot, part)
            end.record(self._stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
        return float(len(part) / min(times) * 1e3)

    def read_rate(self, seen: Tensor) -> float:
        words = seen[: min(len(seen), _MEASURED_BYTES) // 8 * 8].view(torch.int64)
        times = []
        for _ in range(_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            words.max()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return float(words.nbytes / min(times) * 1e3)

    def close(self) -> None:
        self._slots.clear()
        self._driver.close()
