"""The KV pool on a host."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import torch

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.pool import HostPool
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS


def test_regions_lie_in_one_allocation_and_do_not_overlap() -> None:
    layout = KVLayout(16, "bfloat16", (kv_group((0, 1), 3, 64), kv_group((2,), 1, 80, window=100)))
    pool = HostPool(layout, (7, 9))
    memory = pool.memory()
    assert memory.device is None
    assert memory.segments == ()
    regions = memory.regions
    assert [r.size_bytes for r in regions] == [
        layout.block_bytes(0) * 7,
        layout.block_bytes(1) * 9,
        PROBE_BLOCK_BYTES * PROBE_BLOCKS,
    ]
    assert all(r.address % 4096 == 0 for r in regions)
    for one, next_one in itertools.pairwise(regions):
        assert one.address + one.size_bytes <= next_one.address
    assert regions[-1].address + regions[-1].size_bytes <= regions[0].address + pool.size_bytes
    for number, tensor in enumerate(pool.tensors()):
        tensor.fill_(number + 1)
    assert [int(t.unique().item()) for t in pool.tensors()] == [1, 2]


def test_populating_keeps_what_is_written() -> None:
    layout = KVLayout(16, "float32", (kv_group(tuple(range(8)), 4, 64),))
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


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_release_gives_pages_back_and_keeps_addresses() -> None:
    layout = KVLayout(16, "float32", (kv_group(tuple(range(8)), 4, 64),))
    pool = HostPool(layout, (200,))  # 52 MB
    before = pool.memory()
    (tensor,) = pool.tensors()
    tensor.fill_(3)
    pool.populate()  # is stopped by release: it would take the pages again
    full = _resident_bytes()
    assert pool.report().tags["kv_cache"].reserved_bytes == pool.size_bytes

    pool.release()
    assert full - _resident_bytes() > pool.size_bytes // 2
    assert pool.asleep
    report = pool.report()
    assert report.asleep == ["kv_cache"]
    assert report.tags["kv_cache"].reserved_bytes == 0

    pool.restore()
    assert not pool.asleep
    assert pool.memory() == before
    assert int(tensor.max()) == 0
    tensor.fill_(5)
    assert int(tensor.min()) == 5
    pool.release()
