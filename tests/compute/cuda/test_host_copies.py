"""Copies between a GPU's pool and a host tier: the bytes, in registered memory, in plain memory and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pd_serve.compute.cuda import host_copies
from pd_serve.compute.cuda.host_copies import CudaHostMover
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.plain import PlainDeviceMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYOUT = KVLayout(64, "bfloat16", (kv_group(tuple(range(8)), 8, 128), kv_group((8, 9), 8, 128, window=100)))
BLOCKS = 200


@pytest.mark.parametrize("kind", ["registered", "plain", "file"])
def test_blocks_come_back_as_they_were(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "CHUNK_BYTES", 48 << 20)  # so that blocks cross from one to the next
    monkeypatch.setattr(host_copies, "MAX_COPIES", 64)
    pool = PlainDeviceMemory(0).kv_pool(LAYOUT, (BLOCKS, BLOCKS))
    each = sum(LAYOUT.block_bytes(group) for group in (0, 1))
    memory = TierMemory(LAYOUT, BLOCKS * each, str(tmp_path) if kind == "file" else "")
    mover = CudaHostMover(pool.memory(), memory, pin=kind == "registered")
    tensors = [t.view(-1, LAYOUT.block_bytes(group)) for group, t in enumerate(pool.tensors())]
    for tensor in tensors:
        tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8, device=tensor.device))
    before = [tensor.clone() for tensor in tensors]
    torch.cuda.synchronize()
    slots = torch.randperm(min(mover.num_slots) - 1).add(1).tolist()
    copies = [Copy(group, block, slots[block - 1]) for group in (0, 1) for block in range(1, len(slots) + 1)]
    mover.store(copies)
    for tensor in tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    mover.load(copies)
    for tensor, values in zip(tensors, before, strict=True):
        assert torch.equal(tensor[1 : len(slots) + 1], values[1 : len(slots) + 1])
        assert not tensor[0].any()
    assert (mover._batch is not None) == (kind == "registered")
    mover.close()
