"""Whose memory vLLM's KV cache is, seen by its addresses alone."""

from __future__ import annotations

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
