"""nvlink between two processes on two GPUs: content is made and compared on the devices.

pytest's own process never touches CUDA: it starts a source and a reader, each with the GPUs that it may see, the source
in a PID namespace of its own where that is asked for, and a pipe between them that carries what the peer channel would.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pd_serve.errors import TransferError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.transfer.base import BlockMap, Pair, Peer, Pull, PullState, Reader
from pd_serve.transfer.nvlink import NvlinkTransport
from pd_serve.transfer.slices import slicings
from tests.transfer.namespaces import OWN_PROC, PID, USER_AND_PID, namespace, outer_pid, spawned_under, unshare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

HEADS, LAYERS, DIM = 8, 32, 128  # of an 8B model: 2 MiB a block of 16 tokens in bfloat16
SOURCE_SEED, READER_SEED = 11, 12


def layout(block_size: int = 16, first_head: int = 0, heads: int = HEADS) -> KVLayout:
    group = kv_group(tuple(range(LAYERS)), heads, DIM, first_head=first_head, total_kv_heads=HEADS)
    return KVLayout(block_size, "bfloat16", (group,))


@dataclass(frozen=True)
class Ends:
    """What both processes are started with."""

    socket_dir: Path
    source: KVLayout
    reader: KVLayout
    num_blocks: tuple[int, int]  # of the source, of the reader
    own_gpu_only: bool = False
    cumem: bool = True
    own_pids: bool = False  # the source: in another PID namespace
    grown: bool = False  # pools of two blocks, made larger before they are registered


class End:
    """A pool on this process's GPU, filled, and a transport."""

    def __init__(self, ends: Ends, index: int) -> None:
        self.device = 0 if ends.own_gpu_only else index

        from pd_serve.memory.cuda_driver import CudaDriver
        from pd_serve.memory.cumem import CumemAllocator
        from pd_serve.memory.device_pool import DevicePool
        from pd_serve.memory.host_buffers import HostBuffers
        from pd_serve.transfer.movers.cuda import CudaMover

        torch.cuda.set_device(self.device)
        torch.zeros(1, device="cuda")
        self.layout = (ends.source, ends.reader)[index]
        self.driver = CudaDriver()
        allocator = CumemAllocator(self.driver, self.device, HostBuffers()) if ends.cumem else None
        blocks = (ends.num_blocks[index],)
        if ends.grown:
            self.pool = DevicePool(self.layout, (2,), self.device, allocator, max_blocks=(4 * blocks[0],))
            self.pool.resize(blocks)
        else:
            self.pool = DevicePool(self.layout, blocks, self.device, allocator)
        self.memory = self.pool.memory()
        self.blocks = self.pool.tensors()[0]
        fill(self.blocks, (SOURCE_SEED, READER_SEED)[index])
        self.mover = CudaMover(self.device)
        self.transport = NvlinkTransport(self.driver, self.mover, ends.socket_dir)
        self.transport.register(self.memory)

    def close(self) -> None:
        self.transport.close()
        self.mover.close()
        del self.blocks
        self.pool.close()


def fill(memory: Tensor, seed: int) -> None:
    """No two words of a pool are the same, nor those of two seeds at the same place."""
    words = memory.view(torch.int32)
    torch.arange(words.numel(), dtype=torch.int32, device=memory.device, out=words)
    words.mul_(-1640531535).add_(seed * 7919)
    torch.cuda.synchronize()


def as_kv(memory: Tensor, kv: KVLayout) -> Tensor:
    """``[block, layer, K|V, head, token, word]``"""
    shape = kv.block_shape(0)
    return memory.view(torch.int32).view(-1, *shape[:4], shape[4] // 2)


def expected(end: End, ends: Ends, remote: np.ndarray, local: np.ndarray) -> Tensor:
    """What the reader's pool holds after these pieces were pulled."""
    size = ends.source.block_bytes(0) * ends.num_blocks[0]
    theirs = torch.empty(size, dtype=torch.uint8, device=end.blocks.device)
    fill(theirs, SOURCE_SEED)
    ours = torch.empty_like(end.blocks)
    fill(ours, READER_SEED)
    held, kept = as_kv(theirs, ends.source), as_kv(ours, ends.reader)
    s, r = ends.source.groups[0].planes[0], ends.reader.groups[0].planes[0]
    first = max(s.first_head, r.first_head)
    last = min(s.end_head, r.end_head)
    step = min(ends.source.block_size, ends.reader.block_size)
    for piece, target in zip(remote.tolist(), local.tolist(), strict=True):
        (sb, st), (rb, rt) = divmod(piece * step, ends.source.block_size), divmod(target * step, ends.reader.block_size)
        kept[rb, :, :, first - r.first_head : last - r.first_head, rt : rt + step] = held[
            sb, :, :, first - s.first_head : last - s.first_head, st : st + step
        ]
    return ours


# --- processes


def serve(control: Connection, wire: Connection, ends: Ends) -> None:
    """The source: answers until it is killed."""
    try:
        end = End(ends, 0)
        wire.send((outer_pid(), namespace("pid"), end.transport.describe(), end.memory.regions))
        reader: Reader | None = None
        while True:
            what, *args = wire.recv()
            if what == "serve":
                pair = Pair(slicings(ends.source, ends.reader), end.memory.regions, args[1])
                reader = end.transport.serve(args[0], pair, lambda message: wire.send(("message", message)))
            elif what == "message":
                assert reader is not None
                reader.receive(args[0])
            elif what == "withdraw":
                end.transport.close()
                wire.send(("withdrawn",))
    except EOFError:
        pass
    except BaseException:
        control.send(traceback.format_exc())
    os._exit(0)


def read(control: Connection, wire: Connection, ends: Ends, scenario: Callable[[Session], None]) -> None:
    try:
        scenario(Session(wire, ends))
    except BaseException:
        control.send(traceback.format_exc())
    else:
        control.send("")
    os._exit(0)


class Session:
    """The reader's side of one session, in the reader's process."""

    def __init__(self, wire: Connection, ends: Ends) -> None:
        self.wire = wire
        self.ends = ends
        self.end = End(ends, 1)
        assert wire.poll(120), "the source does not start"
        self.source_pid, its_namespace, self.description, self.regions = wire.recv()
        assert (its_namespace != namespace("pid")) == ends.own_pids
        self.peer = self.connect()

    def connect(self) -> Peer:
        pair = Pair(slicings(self.ends.source, self.ends.reader), self.regions, self.end.memory.regions)
        self.wire.send(("serve", self.end.transport.describe(), self.end.memory.regions))
        return self.end.transport.connect(self.description, pair, lambda message: self.wire.send(("message", message)))

    def answer(self) -> Any:
        assert self.wire.poll(30), "the source does not answer"
        return self.wire.recv()

    def offered(self) -> None:
        self.peer.receive(self.answer()[1])

    def pull(self, remote: np.ndarray, local: np.ndarray, times: int = 1) -> Pull:
        item = BlockMap(0, remote.astype(np.int64), local.astype(np.int64))
        return self.end.transport.pull(self.peer, [item] * times)

    def kill_source(self) -> None:
        os.kill(self.source_pid, signal.SIGKILL)

    def settle(self) -> None:
        until(lambda: self.end.transport.progress() == float("inf"))


def until(ask: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ask():
        assert time.monotonic() < deadline, f"nothing within {timeout_s} s"


def finished(*pulls: Pull) -> None:
    until(lambda: all(pull.poll() is not PullState.RUNNING for pull in pulls))
    for pull in pulls:
        if pull.poll() is PullState.FAILED:
            raise pull.error()
        assert pull.close()


def start(process: Any, index: int, ends: Ends, under: Sequence[str] = ()) -> None:
    """What a process may see must be settled before it imports torch."""
    with pytest.MonkeyPatch.context() as patch, spawned_under(under):
        if ends.own_gpu_only:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            patch.setenv("CUDA_VISIBLE_DEVICES", visible[index])
        process.start()


def run(ends: Ends, scenario: Callable[[Session], None]) -> None:
    under = unshare((*PID, "--mount"), (*USER_AND_PID, "--mount"), then=OWN_PROC) if ends.own_pids else []
    spawn = multiprocessing.get_context("spawn")
    wires, controls = spawn.Pipe(), [spawn.Pipe() for _ in range(2)]
    source = spawn.Process(target=serve, args=(controls[0][1], wires[0], ends), daemon=True)
    start(source, 0, ends, under)
    reader = spawn.Process(target=read, args=(controls[1][1], wires[1], ends, scenario), daemon=True)
    start(reader, 1, ends)
    for connection in (*wires, *(mine for _, mine in controls)):
        connection.close()
    try:
        problem = "the reader did not answer"
        try:
            if controls[1][0].poll(240):
                problem = controls[1][0].recv()
        except EOFError:
            reader.join(5)
            problem = f"the reader ended with {reader.exitcode}"
        if problem:
            try:
                if controls[0][0].poll(0):
                    problem += f"\nthe source: {controls[0][0].recv()}"
            except EOFError:
                pass
        assert not problem, problem
    finally:
        reader.kill()
        reader.join(10)
        source.join(10)  # it ends with the reader's end of the wire
        source.kill()
        source.join(10)


# --- scenarios, run in the reader's process


def pulls_many_requests(session: Session) -> None:
    """Four requests in one turn, scattered blocks on both sides; every byte of the pool is compared."""
    ends, end = session.ends, session.end
    session.offered()
    step = min(ends.source.block_size, ends.reader.block_size)
    pieces = [n * kv.block_size // step for n, kv in zip(ends.num_blocks, (ends.source, ends.reader), strict=True)]
    rng = np.random.default_rng(0)
    count = min(pieces) * 3 // 4 // 4 * 4
    remote, local = rng.permutation(pieces[0])[:count], rng.permutation(pieces[1])[:count]
    pulls = [session.pull(r, t) for r, t in zip(np.split(remote, 4), np.split(local, 4), strict=True)]
    finished(*pulls)
    torch.cuda.synchronize()
    assert torch.equal(end.blocks, expected(end, ends, remote, local))
    size = sum(pull.size_bytes for pull in pulls)
    assert size == slicings(ends.source, ends.reader)[0].piece_bytes * count
    session.peer.close()
    session.settle()
    end.close()


def sessions_come_and_go(session: Session) -> None:
    """Mapped and unmapped again and again: nothing of it stays, on the device or as descriptors."""
    all_blocks = np.arange(min(session.ends.num_blocks))
    fds = 0
    for turn in range(5):
        session.offered()
        finished(session.pull(all_blocks, all_blocks))
        session.peer.close()
        session.settle()
        if turn == 0:
            fds = len(list(Path("/proc/self/fd").iterdir()))
        session.peer = session.connect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= fds
    session.peer.close()
    session.end.close()


def the_source_dies_in_mid_pull(session: Session) -> None:
    ends, end = session.ends, session.end
    session.offered()
    blocks = np.arange(min(ends.num_blocks))
    finished(session.pull(blocks[:1], blocks[:1]))
    free_before = None if ends.own_gpu_only else end.driver.memory_info(0)[0]
    pulls = [session.pull(blocks, blocks, times=200) for _ in range(2)]
    assert pulls[0].poll() is PullState.RUNNING  # 400 GiB in all, about a second
    session.kill_source()
    assert pulls[1].poll() is PullState.RUNNING, "it ended before the source was killed: pull more"
    session.peer.close()
    until(lambda: all(pull.poll() is not PullState.RUNNING for pull in pulls))
    assert all(pull.close() for pull in pulls)
    for pull in pulls:
        if pull.poll() is PullState.FAILED:
            assert isinstance(pull.error(), TransferError)
    session.settle()
    with pytest.raises(TransferError):
        session.pull(blocks[:1], blocks[:1])
    # the device works, and so does the mover
    end.blocks.zero_()
    torch.cuda.synchronize()
    assert int(end.blocks.view(torch.int32).count_nonzero()) == 0
    if free_before is not None and ends.cumem:
        pool_bytes = ends.source.block_bytes(0) * ends.num_blocks[0]
        until(lambda: end.driver.memory_info(0)[0] >= free_before + pool_bytes * 9 // 10)
    end.close()


def the_source_dies_before_it_is_mapped(session: Session) -> None:
    fds = len(list(Path("/proc/self/fd").iterdir()))
    offer = session.answer()[1]
    session.kill_source()
    until(lambda: not Path(f"/proc/{session.source_pid}/fd").exists() or not _fds_of(session.source_pid))
    session.peer.receive(offer)
    pull = session.pull(np.arange(1), np.arange(1))
    until(lambda: pull.poll() is not PullState.RUNNING)
    assert pull.poll() is PullState.FAILED
    assert pull.error().kind == "connect"
    session.peer.close()
    session.settle()
    assert len(list(Path("/proc/self/fd").iterdir())) <= fds
    session.end.close()


def _fds_of(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0  # a zombie


def the_source_withdraws(session: Session) -> None:
    """What is mapped can be read on; nobody else can map it."""
    session.offered()
    blocks = np.arange(min(session.ends.num_blocks))
    finished(session.pull(blocks, blocks))
    session.wire.send(("withdraw",))
    assert session.answer() == ("withdrawn",)
    finished(session.pull(blocks, blocks))
    session.peer.close()
    session.settle()
    session.peer = session.connect()
    session.offered()
    with pytest.raises(TransferError, match="withdrawn"):
        session.pull(blocks, blocks)
    session.peer.close()
    session.end.close()


# --- tests

SMALL = (192, 160)
LAYOUTS = {
    "2 MiB blocks": (layout(), layout(), SMALL),
    "32 KiB slices, TP 2 to 1": (layout(32, 0, 4), layout(32), (96, 80)),
    "TP 1 to 2": (layout(), layout(16, 4, 4), SMALL),
    "TP 4 to 2": (layout(16, 2, 2), layout(16, 0, 4), SMALL),
    "blocks of 16 to 64 tokens": (layout(16), layout(64), (192, 40)),
    "blocks of 64 to 16 tokens, TP 2 to 1": (layout(64, 4, 4), layout(16), (48, 160)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pulls_bring_the_right_bytes(tmp_path: Path, name: str) -> None:
    source, reader, num_blocks = LAYOUTS[name]
    run(Ends(tmp_path, source, reader, num_blocks), pulls_many_requests)


def test_pools_that_were_made_larger(tmp_path: Path) -> None:
    run(Ends(tmp_path, layout(), layout(), SMALL, own_gpu_only=True, grown=True), pulls_many_requests)


def test_each_process_sees_its_own_gpu_only(tmp_path: Path) -> None:
    run(Ends(tmp_path, layout(32, 0, 4), layout(32), (96, 80), own_gpu_only=True), pulls_many_requests)


def test_two_containers_with_a_gpu_each(tmp_path: Path) -> None:
    """Each sees its own GPU only, and the source's process id means nothing to the reader."""
    ends = Ends(tmp_path, layout(32, 0, 4), layout(32), (96, 80), own_gpu_only=True, own_pids=True)
    run(ends, pulls_many_requests)


@pytest.mark.parametrize("own_gpu_only", [False, True])
def test_memory_that_is_not_cumem(tmp_path: Path, own_gpu_only: bool) -> None:
    run(Ends(tmp_path, layout(), layout(), SMALL, own_gpu_only, cumem=False), pulls_many_requests)


@pytest.mark.parametrize("cumem", [True, False])
def test_sessions_leave_nothing_behind(tmp_path: Path, cumem: bool) -> None:
    run(Ends(tmp_path, layout(), layout(), SMALL, cumem=cumem), sessions_come_and_go)


@pytest.mark.parametrize(("own_gpu_only", "own_pids"), [(False, False), (True, False), (True, True)])
def test_a_source_killed_in_mid_pull(tmp_path: Path, own_gpu_only: bool, own_pids: bool) -> None:
    run(Ends(tmp_path, layout(), layout(), (512, 512), own_gpu_only, own_pids=own_pids), the_source_dies_in_mid_pull)


def test_a_source_killed_in_mid_pull_over_cuda_ipc(tmp_path: Path) -> None:
    run(Ends(tmp_path, layout(), layout(), (512, 512), cumem=False), the_source_dies_in_mid_pull)


@pytest.mark.parametrize("own_pids", [False, True])
def test_a_source_killed_before_it_was_mapped(tmp_path: Path, own_pids: bool) -> None:
    run(Ends(tmp_path, layout(), layout(), (8, 8), own_pids=own_pids), the_source_dies_before_it_is_mapped)


def test_a_source_that_withdraws(tmp_path: Path) -> None:
    run(Ends(tmp_path, layout(), layout(), SMALL), the_source_withdraws)
