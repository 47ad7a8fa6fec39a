"""UCX between pools of GPU memory: in one process, and from GPU 0 to the last GPU between two."""

from __future__ import annotations

import multiprocessing
import os
import select
import time
from collections import deque
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState
from pd_serve.transfer.slices import slicings
from tests.transfer.ucx_ends import blocks, expected

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("ucxx") is None, reason="pd-serve[ucx] is not installed"),
]


def layout(block_size: int, layers: int = 8) -> KVLayout:
    return KVLayout(block_size, "bfloat16", (kv_group(tuple(range(layers)), 4, 128),))


class DevicePool:
    """Blocks of one group, then the probe region, in memory of cudaMalloc."""

    def __init__(self, kv: KVLayout, num_blocks: int, device: int, seed: int | None = None) -> None:
        torch.cuda.set_device(device)
        self.layout, self.device = kv, device
        shape = (num_blocks, kv.block_bytes(0))
        host = np.full(shape, 7, dtype=np.uint8)
        if seed is not None:
            host = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        self.blocks = torch.from_numpy(host).to(f"cuda:{device}")
        self.probe = torch.zeros((PROBE_BLOCKS, PROBE_BLOCK_BYTES), dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize(device)

    def memory(self) -> PoolMemory:
        regions = (Region(t.data_ptr(), t.shape[1], t.shape[0]) for t in (self.blocks, self.probe))
        return PoolMemory(self.device, tuple(regions))

    def content(self) -> np.ndarray:
        return self.blocks.cpu().numpy()


def started(pool: DevicePool) -> Any:
    from pd_serve.transfer.movers.cuda import CudaMover
    from pd_serve.transfer.ucx import UcxTransport

    torch.cuda.set_device(pool.device)
    made = UcxTransport(CudaMover(pool.device))
    made.register(pool.memory())
    return made


def wait(pull: Any, turn: Any) -> None:
    deadline = time.monotonic() + 30
    while pull.poll() is PullState.RUNNING:
        assert time.monotonic() < deadline
        turn()
    assert pull.poll() is PullState.DONE, pull.error()
    while not pull.close():
        turn()


@pytest.mark.parametrize(("source_block", "reader_block"), [(16, 16), (16, 64), (64, 16)])
def test_the_right_bytes_within_one_process(source_block: int, reader_block: int) -> None:
    theirs, ours = DevicePool(layout(source_block), 96, 0, seed=1), DevicePool(layout(reader_block), 96, 0)
    source, reader = started(theirs), started(ours)
    found = slicings(theirs.layout, ours.layout)
    pair = Pair(found, theirs.memory().regions, ours.memory().regions)
    to_source: deque[bytes] = deque()
    to_reader: deque[bytes] = deque()
    served = source.serve(reader.describe(), pair, to_reader.append)
    peer = reader.connect(source.describe(), pair, to_source.append)

    def turn() -> None:
        while to_source:
            served.receive(to_source.popleft())
        while to_reader:
            peer.receive(to_reader.popleft())
        source.progress()
        reader.progress()

    rng = np.random.default_rng(0)
    item = blocks(
        0,
        rng.permutation(96 * found[0].source.pieces_per_block)[:90],
        rng.permutation(96 * found[0].reader.pieces_per_block)[:90],
    )
    after = expected(found[0], theirs.content(), ours.content(), item)
    wait(reader.pull(peer, [item]), turn)
    assert np.array_equal(ours.content(), after)
    reader.close()
    source.close()


def _source(pipe: Connection, kv: KVLayout, num_blocks: int) -> None:
    pool = DevicePool(kv, num_blocks, 0, seed=5)
    made = started(pool)
    pipe.send((made.describe(), pool.memory().regions))
    description, regions = pipe.recv()
    pair = Pair(slicings(kv, kv), pool.memory().regions, regions)
    served = made.serve(description, pair, pipe.send)
    while True:
        if select.select([pipe], [], [], min(made.progress(), 1.0))[0]:
            try:
                served.receive(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)


@pytest.mark.parametrize("how", ["fragmented", "contiguous"])
def test_the_right_bytes_between_two_processes(how: str) -> None:
    kv, num_blocks = layout(64, layers=16), 256  # 2 MiB a block
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=_source, args=(child, kv, num_blocks), daemon=True)
    process.start()
    child.close()
    ours = DevicePool(kv, num_blocks, torch.cuda.device_count() - 1)
    reader = started(ours)
    assert pipe.poll(60)
    description, regions = pipe.recv()
    pair = Pair(slicings(kv, kv), regions, ours.memory().regions)
    pipe.send((reader.describe(), ours.memory().regions))
    peer = reader.connect(description, pair, pipe.send)

    def turn() -> None:
        while pipe.poll(0):
            peer.receive(pipe.recv())
        reader.progress()

    rng = np.random.default_rng(0)
    order = rng.permutation(num_blocks) if how == "fragmented" else np.arange(num_blocks)
    for _ in range(5):
        started_s = time.perf_counter()
        pull = reader.pull(peer, [BlockMap(0, order.astype(np.int64), order[::-1].astype(np.int64).copy())])
        if how == "contiguous":
            wait(pull, turn)
            pull = reader.pull(peer, [BlockMap(0, order.astype(np.int64), order.astype(np.int64))])
            started_s = time.perf_counter()
        wait(pull, turn)
        seconds = time.perf_counter() - started_s
        print(f"ucx, {how}: {pull.size_bytes / seconds / 1e9:.1f} GB/s, {pull.num_descriptors} messages")
    theirs = np.random.default_rng(5).integers(0, 256, (num_blocks, kv.block_bytes(0)), dtype=np.uint8)
    target = order if how == "contiguous" else order[::-1]
    after = np.empty_like(theirs)
    after[target] = theirs[order]
    assert np.array_equal(ours.content(), after)
    process.kill()
    process.join(5)
    peer.close()
    reader.close()
