"""A KV pool that gets its size after CUDA graphs were captured over it, and what the driver says of it all."""

from __future__ import annotations

import array
import gc
import multiprocessing
import socket
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.cumem import OutOfDeviceMemory
from pd_serve.memory.device_pool import DevicePool, tensor_at
from pd_serve.memory.driver import HandleType
from pd_serve.memory.gauge import DeviceGauge
from pd_serve.memory.ledger import ACTIVATIONS, GRAPHS, LIBRARIES, Ledger
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.sleep import DeviceMemory
from pd_serve.memory.usage import KV_CACHE, WEIGHTS

MIB, GIB = 1 << 20, 1 << 30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS, HEADS, DIM, BLOCK = 32, 8, 128, 16
LAYOUT = KVLayout(BLOCK, "bfloat16", (kv_group(tuple(range(LAYERS)), HEADS, DIM),))  # 2 MiB a block
SMALL = 32


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    made = DeviceMemory(0, pin=should_pin_memory(True, 0))
    yield made
    gc.collect()
    made.close()


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def most() -> int:
    return torch.cuda.mem_get_info(0)[1] // LAYOUT.block_bytes(0)


def final() -> int:
    """Blocks: most of what is free, far beyond what 32 bits address."""
    return (free_bytes() - 4 * GIB) // LAYOUT.block_bytes(0)


class WritesAndReads:
    """A graph that stores ``source`` at words of the pool and reads them back plus one."""

    COUNT = 4096

    def __init__(self, pool: DevicePool) -> None:
        self.words = pool.reserved_tensors()[0].view(torch.float32)
        self.index = torch.arange(self.COUNT, device="cuda:0")
        self.source, self.result = torch.zeros(2, self.COUNT, device="cuda:0")
        stream = torch.cuda.Stream(device=0)
        with torch.cuda.stream(stream):
            self._work()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(0), torch.cuda.graph(self.graph, stream=stream):
            self._work()

    def _work(self) -> None:
        self.words.index_put_((self.index,), self.source)
        self.result.copy_(self.words.index_select(0, self.index) + 1)

    def check(self, pool: DevicePool) -> None:
        """Words all over the pool, its first and last among them."""
        now = pool.tensors()[0].view(torch.float32)
        self.index.copy_(torch.linspace(0, now.numel() - 1, self.COUNT, dtype=torch.float64).long())
        self.source.normal_()
        self.graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(self.result, self.source + 1)
        assert torch.equal(now[self.index], self.source)
        assert int(self.index[-1]) == now.numel() - 1


def test_a_graph_replays_over_the_final_memory_and_after_sleep(memory: DeviceMemory) -> None:
    with memory.use_memory_pool("weights"):
        weight = torch.arange(8 * MIB, device="cuda:0")
    pool = memory.kv_pool(LAYOUT, (SMALL,), max_blocks=(most(),))
    graph = WritesAndReads(pool)
    graph.check(pool)
    address, blocks = pool.memory().regions[0].address, final()
    pool.resize((blocks,))
    described = pool.memory()
    assert described.regions[0].address == address
    assert described.regions[0].num_blocks == blocks
    (segment,) = described.segments
    assert segment.size_bytes >= described.regions[0].size_bytes
    assert memory.report().tags["kv_cache"].bytes == pool.size_bytes
    assert int(pool.tensors()[0][-BLOCK:].count_nonzero()) == 0
    graph.check(pool)
    levels: list[int] = []
    for cycle in range(20):
        memory.sleep(1 if cycle % 2 else 2)
        memory.wake()
        if cycle % 2 == 0:  # dropped
            torch.arange(8 * MIB, out=weight)
        graph.check(pool)
        assert bool((weight[-3:].cpu() == torch.arange(8 * MIB - 3, 8 * MIB)).all())
        levels.append(free_bytes())
    assert max(levels) - min(levels) <= 4 * MIB
    assert pool.memory().regions == described.regions


def test_more_than_there_is_leaves_the_small_pool(memory: DeviceMemory) -> None:
    pool = memory.kv_pool(LAYOUT, (SMALL,), max_blocks=(2 * most(),))
    graph = WritesAndReads(pool)
    free = free_bytes()
    with pytest.raises(OutOfDeviceMemory, match=r"bytes are free"):
        pool.resize((most() + 1,))
    assert abs(free_bytes() - free) <= 4 * MIB
    graph.check(pool)
    pool.resize((final(),))
    graph.check(pool)


def test_attention_in_a_graph_reads_the_final_memory(memory: DeviceMemory) -> None:
    pytest.importorskip("flashinfer")
    from pd_serve.compute.cuda.attention import AttentionShape, Workspaces, XqaDecode, xqa_has

    device = torch.device("cuda", 0)
    shape = AttentionShape(32, HEADS, DIM, BLOCK, DIM**-0.5)
    if not xqa_has(shape, device):
        pytest.skip("this GPU has no XQA")

    def layer(blocks: Tensor) -> tuple[Tensor, Tensor]:
        kv = blocks.view(torch.bfloat16).view(-1, LAYERS, 2, HEADS, BLOCK, DIM)[:, 7]
        return kv[:, 0], kv[:, 1]

    pool = memory.kv_pool(LAYOUT, (SMALL,), max_blocks=(most(),))
    rows, context = 4, 100
    table_blocks = -(-context // BLOCK)
    decode = XqaDecode(shape, rows, table_blocks, device, Workspaces(device))
    q = torch.randn(rows, 32, DIM, device=device, dtype=torch.bfloat16)
    out = torch.zeros_like(q)
    k, v = layer(pool.reserved_tensors()[0])
    decode.begin_capture([rows])
    decode.capture(rows)
    stream = torch.cuda.Stream(device=0)
    with torch.cuda.stream(stream):
        decode.run(q, k, v, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(0), torch.cuda.graph(graph, stream=stream):
        decode.run(q, k, v, out)
    pool.resize((final(),))
    blocks = pool.tensors()[0].view(torch.bfloat16).view(-1, LAYERS, 2, HEADS, BLOCK, DIM)
    near = torch.arange(1, 1 + rows * table_blocks, dtype=torch.int32).view(rows, table_blocks)
    far = len(blocks) - near
    for block in near.flatten().tolist():
        blocks[block, 7].normal_()
        blocks[len(blocks) - block, 7].copy_(blocks[block, 7])
    lens = torch.full((rows,), context, dtype=torch.int32)
    results = []
    for tables in (near, far):
        decode.replay(rows, tables, lens)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
    table = near.long().to(device)
    keys, values = (x[table].transpose(2, 3).flatten(1, 2)[:, :context].float() for x in layer(pool.tensors()[0]))
    keys, values = (x.repeat_interleave(4, 2).transpose(1, 2) for x in (keys, values))
    scores = (keys @ q.float()[..., None]).squeeze(-1) * DIM**-0.5
    expected = (scores.softmax(-1)[..., None, :] @ values).squeeze(-2)
    assert float((results[0].float() - expected).norm() / expected.norm()) < 1e-2
    assert torch.equal(results[0], results[1])


def _peer(wire: Connection, fd_socket: socket.socket, size: int) -> None:
    """Another process: maps what it is handed, reads and writes its ends."""
    try:
        _, ancillary, _, _ = fd_socket.recvmsg(1, socket.CMSG_SPACE(4))
        (fd,) = array.array("i", ancillary[0][2])
        torch.cuda.init()
        torch.zeros(1, device="cuda:0")
        driver = CudaDriver()
        handle = driver.import_fd(fd)
        address = driver.reserve(size, 0)
        driver.map(address, size, handle, 0)
        words = tensor_at(address, size, 0).view(torch.int32)
        step = words.numel() // 1000
        wire.send(words[::step].cpu().tolist())
        words[-1] = 77
        torch.cuda.synchronize()
        driver.unmap(address, size)
        driver.release(handle)
        driver.free_address(address, size)
        wire.send("done")
    except BaseException:
        wire.send(traceback.format_exc())


def test_a_peer_maps_the_final_memory(memory: DeviceMemory) -> None:
    pool = memory.kv_pool(LAYOUT, (SMALL,), max_blocks=(most(),))
    if pool.memory().segments[0].handle_type is not HandleType.POSIX_FD:
        pytest.skip("not a machine with handles that are file descriptors")
    pool.resize(((free_bytes() - 6 * GIB) // LAYOUT.block_bytes(0),))
    (segment,) = pool.memory().segments
    words = tensor_at(segment.address, segment.size_bytes, 0).view(torch.int32)
    torch.arange(words.numel(), dtype=torch.int32, device="cuda:0", out=words)
    torch.cuda.synchronize()
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    ours, peers = socket.socketpair()
    process = spawn.Process(target=_peer, args=(theirs, peers, segment.size_bytes), daemon=True)
    process.start()
    driver = CudaDriver()
    fd = driver.export_fd(segment.handle)
    socket.send_fds(ours, [b"x"], [fd])
    socket.close(fd)
    assert mine.poll(60), "the peer does not answer"
    seen = mine.recv()
    step = words.numel() // 1000
    assert isinstance(seen, list), seen
    assert torch.equal(torch.tensor(seen, dtype=torch.int32), words[::step].cpu())
    assert mine.poll(60)
    assert mine.recv() == "done"
    assert int(words[-1]) == 77
    process.join(10)


def _start(wire: Connection) -> None:
    """An engine's start, with a model of nothing: what the ledger says beside what the driver says."""
    try:
        driver = CudaDriver()
        gauge = DeviceGauge(driver, 0)
        before = gauge.before_context()
        driver.synchronize(0)
        memory = DeviceMemory(0, pin=False)

        def books() -> int:
            return sum(tag.reserved_bytes for tag in memory.report().tags.values()) + torch.cuda.memory_reserved(0)

        ledger = Ledger(gauge.read, books=books, before=before)
        with ledger.phase(LIBRARIES):
            small = torch.randn(64, 64, device="cuda:0", dtype=torch.bfloat16)
            small @ small
        with ledger.phase(WEIGHTS), memory.use_memory_pool(WEIGHTS):
            weights = [torch.randn(4096, 4096, device="cuda:0", dtype=torch.bfloat16) for _ in range(32)]
        with ledger.phase(KV_CACHE, booked=True):
            pool = memory.kv_pool(LAYOUT, (SMALL,), max_blocks=(most(),))

        def step(x: Tensor) -> Tensor:
            for weight in weights:
                x = x @ weight
            return x

        with ledger.phase(ACTIVATIONS), torch.no_grad():
            step(torch.randn(65536, 4096, device="cuda:0", dtype=torch.bfloat16))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        graphs = []
        with ledger.phase(GRAPHS), torch.no_grad():
            handle = torch.cuda.graph_pool_handle()
            for rows in (256, 128, 64, 32, 16, 8, 4, 2, 1):
                x = torch.randn(rows, 4096, device="cuda:0", dtype=torch.bfloat16)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=handle):
                    step(x)
                graphs.append((graph, x))
        with ledger.phase(ACTIVATIONS), torch.no_grad():
            step(torch.randn(65536, 4096, device="cuda:0", dtype=torch.bfloat16))
        plan = ledger.plan(0.92, GIB)
        with ledger.phase(KV_CACHE, booked=True):
            pool.resize(((plan.kv_bytes - 4 * MIB) // LAYOUT.block_bytes(0),))
        free, total = torch.cuda.mem_get_info(0)
        nvml = gauge.read().others
        gauge.close()
        wire.send({
            "line": plan.line("cuda:0"), "before": before, "others": nvml, "phases": ledger.phases,
            "driver": total - free, "total": total, "kv": pool.size_bytes, "planned": plan.kv_bytes,
            "unexplained": ledger.unexplained_bytes(),
        })  # fmt: skip
    except BaseException:
        wire.send(traceback.format_exc())


def test_the_ledger_says_what_the_driver_says() -> None:
    torch.cuda.empty_cache()
    spawn = multiprocessing.get_context("spawn")  # from before there was a context
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=_start, args=(theirs,), daemon=True)
    process.start()
    assert mine.poll(90), "no answer"
    said = mine.recv()
    process.join(10)
    assert isinstance(said, dict), said
    print("RESULT ledger", {k: v / MIB if isinstance(v, int) else v for k, v in said.items()})
    others = said["before"].others if said["before"] else 0
    assert abs(sum(said["phases"].values()) - (said["driver"] - others)) <= 256 * MIB
    assert abs(said["unexplained"]) <= 256 * MIB
    assert abs(sum(said["phases"].values()) - 0.92 * said["total"]) <= 32 * MIB
    assert said["phases"][WEIGHTS] == pytest.approx(GIB, abs=64 * MIB)
    assert said["phases"][KV_CACHE] == pytest.approx(said["kv"], abs=8 * MIB)
