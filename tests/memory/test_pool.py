"""The KV pool on a host."""

from __future__ import annotations

import threading

import torch

from pd_serve.kv.layout import KVLayout, LayerGroup
from pd_serve.memory.pool import HostPool


def test_regions_lie_in_one_allocation_and_do_not_overlap() -> None:
    layout = KVLayout(16, "bfloat16", (LayerGroup((0, 1), 3, 64), LayerGroup((2,), 1, 80, window=100)))
    pool = HostPool(layout, (7, 9))
    regions = pool.regions()
    assert [r.size_bytes for r in regions] == [layout.block_bytes(0) * 7, layout.block_bytes(1) * 9]
    assert all(r.address % 4096 == 0 for r in regions)
    assert regions[0].address + regions[0].size_bytes <= regions[1].address
    for number, tensor in enumerate(pool.tensors()):
        tensor.fill_(number + 1)
    assert [int(t.unique().item()) for t in pool.tensors()] == [1, 2]


def test_populating_keeps_what_is_written() -> None:
    layout = KVLayout(16, "float32", (LayerGroup(tuple(range(8)), 4, 64),))
    pool = HostPool(layout, (200,))
    (tensor,) = pool.tensors()
    tensor.copy_(torch.arange(len(tensor), dtype=torch.int64).to(torch.uint8))
    pool.populate()
    (thread,) = (t for t in threading.enumerate() if t.name == "pd-populate")
    tensor[:1000] = 7
    thread.join(30)
    assert not thread.is_alive()
    assert int(tensor[:1000].min()) == 7
    assert torch.equal(tensor[1000:], torch.arange(1000, len(tensor), dtype=torch.int64).to(torch.uint8))
