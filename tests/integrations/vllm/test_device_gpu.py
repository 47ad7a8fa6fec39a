"""Whose memory vLLM's KV cache is, seen by its addresses alone; when a step has ended."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pd_serve.integrations.vllm.device import DeviceMemory, supplied
from pd_serve.memory.region import Region

MIB = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def regions(tensors: list[torch.Tensor]) -> tuple[Region, ...]:
    return tuple(Region(tensor.data_ptr(), MIB, tensor.numel() // MIB) for tensor in tensors)


def test_torchs_own_memory_has_no_handles() -> None:
    memory = DeviceMemory(regions([torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda:0")]), 0)
    assert memory.memory.segments == ()
    assert memory.memory.regions[-1].address % 4096 == 0
    ended = memory.step_ended()
    torch.cuda.synchronize()
    assert ended is not None
    assert ended()


def test_asking_whether_a_step_has_ended_does_not_wait_for_who_launches() -> None:
    """As the transfer thread asks while vLLM's launches a prefill of more kernels than the device's queue holds."""
    memory = DeviceMemory(regions([torch.zeros(MIB, dtype=torch.uint8, device="cuda:0")]), 0)
    numbers = torch.zeros(1024, device="cuda:0")
    before = memory.step_ended()
    torch.cuda._sleep(1_000_000_000)  # half a second
    after = memory.step_ended()
    assert before is not None
    assert after is not None
    launching = threading.Thread(target=lambda: [numbers.add_(1) for _ in range(5000)])
    launching.start()
    time.sleep(0.1)
    begun_s = time.monotonic()
    answers = [before(), after()]
    assert time.monotonic() - begun_s < 0.05
    assert launching.is_alive(), "the queue is full"
    launching.join()
    assert answers == [True, False]
    torch.cuda.synchronize()
    assert after()


def test_memory_that_we_supply_is_covered_by_its_handles_and_so_is_the_probe() -> None:
    context = supplied(0)
    assert context is not None
    with context:
        tensors = [torch.zeros(48 * MIB, dtype=torch.uint8, device="cuda:0") for _ in range(2)]
    found = DeviceMemory(regions(tensors), 0).memory
    for region in found.regions:
        assert any(
            s.address <= region.address and region.address + region.size_bytes <= s.address + s.size_bytes
            for s in found.segments
        )
    assert len({segment.handle_type for segment in found.segments}) == 1
