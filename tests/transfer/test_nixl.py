"""The NIXL backend by itself: real agents, real bytes, real deaths."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.transfer.base import BlockMap, PullState
from pd_serve.transfer.nixl import NixlPull, NixlTransport
from tests.transfer.harness import LARGE, SMALL, Pool, agent_name, until


def blocks(group: int, remote: np.ndarray, local: np.ndarray) -> BlockMap:
    return BlockMap(group, np.asarray(remote, dtype=np.int64), np.asarray(local, dtype=np.int64))


def done(pull: NixlPull, timeout_s: float = 10.0) -> PullState:
    until(lambda: pull.poll() is not PullState.RUNNING, timeout_s)
    return pull.poll()


_alive: list[Pool] = []  # memory must outlive its registration


def transport(pool: Pool, prefix: str = "t") -> NixlTransport:
    _alive.append(pool)
    made = NixlTransport(agent_name(prefix))
    made.register(pool.regions())
    return made


@pytest.fixture
def pair() -> Iterator[tuple[Pool, NixlTransport, Pool, NixlTransport]]:
    theirs, ours = Pool(SMALL, 96, seed=3), Pool(SMALL, 80)
    p, d = transport(theirs, "p"), transport(ours, "d")
    yield theirs, p, ours, d
    d.close()
    p.close()


@pytest.mark.parametrize("seed", range(5))
def test_random_maps_bring_the_right_bytes(pair: tuple[Pool, NixlTransport, Pool, NixlTransport], seed: int) -> None:
    theirs, p, ours, d = pair
    rng = np.random.default_rng(seed)
    peer = d.connect(p.describe())
    maps, expected = [], [g.copy() for g in ours.groups]
    for group in range(2):
        count = int(rng.integers(1, 60))
        if seed % 2:  # runs of neighbours, some of them descending
            start = int(rng.integers(1, 20))
            remote = np.concatenate([np.arange(start + 30, start + 20, -1), np.arange(start, start + 15)])
            local = np.concatenate([np.arange(40, 30, -1), np.arange(1, 16)])
        else:
            remote, local = rng.permutation(96)[:count], rng.permutation(80)[:count]
        maps.append(blocks(group, remote, local))
        expected[group][local] = theirs.groups[group][remote]
    pull = d.pull(peer, maps)
    assert done(pull) is PullState.DONE
    assert pull.close()
    assert pull.size_bytes == sum(len(m.local) * SMALL.block_bytes(m.group) for m in maps)
    assert pull.num_descriptors <= sum(len(m.local) for m in maps)
    if seed % 2:
        assert pull.num_descriptors == 4
    for group in range(2):
        assert np.array_equal(ours.groups[group], expected[group])
    peer.close()


def test_a_peer_can_be_left_and_met_again(pair: tuple[Pool, NixlTransport, Pool, NixlTransport]) -> None:
    theirs, p, ours, d = pair
    for block in range(1, 4):
        peer = d.connect(p.describe())
        pull = d.pull(peer, [blocks(0, [block], [block])])
        assert done(pull) is PullState.DONE
        assert pull.close()
        peer.close()
        assert np.array_equal(ours.groups[0][block], theirs.groups[0][block])


def test_blocks_outside_of_the_pools_are_refused(pair: tuple[Pool, NixlTransport, Pool, NixlTransport]) -> None:
    _, p, ours, d = pair
    peer = d.connect(p.describe())
    before = [g.copy() for g in ours.groups]
    for remote, local in (([96], [1]), ([1], [80]), ([-1], [1]), ([1], [-1])):
        with pytest.raises(TransferError, match="outside"):
            d.pull(peer, [blocks(0, remote, local)])
    assert all(np.array_equal(a, b) for a, b in zip(before, ours.groups, strict=True))


def test_other_block_sizes_and_nonsense_are_refused_at_connect(
    pair: tuple[Pool, NixlTransport, Pool, NixlTransport],
) -> None:
    _, _, _, d = pair
    other = transport(Pool(LARGE, 4, seed=1))
    with pytest.raises(HandshakeError, match="block sizes differ"):
        d.connect(other.describe())
    other.close()
    with pytest.raises(HandshakeError, match="cannot be read"):
        d.connect(b"\x93\x01\x02\x03")


# --- peers in processes of their own


class Target:
    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child = spawn.Pipe()
        self.process = spawn.Process(target=_target, args=(child, layout, num_blocks), daemon=True)
        self.process.start()
        child.close()
        assert self.pipe.poll(30)
        self.description: bytes = self.pipe.recv()
        self.pool = Pool(layout, num_blocks, seed=5)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(5)

    def close(self) -> None:
        if self.process.is_alive():
            self.kill()


def _target(pipe: Connection, layout: KVLayout, num_blocks: int) -> None:
    made = transport(Pool(layout, num_blocks, seed=5), "target")
    pipe.send(made.describe())
    while True:
        for _ in range(10_000):  # holds the GIL: serving reads must not need it
            pass
        if pipe.poll(0):
            os._exit(0)


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where reading another process's memory is forbidden: UCX falls back."""
    monkeypatch.setenv("UCX_TLS", "^cma")


def test_reads_while_the_target_computes_with_the_gil_held() -> None:
    target, ours = Target(SMALL, 64), Pool(SMALL, 64)
    d = transport(ours)
    started = time.monotonic()
    peer = d.connect(target.description)
    pull = d.pull(peer, [blocks(0, np.arange(1, 64), np.arange(1, 64))])
    assert done(pull) is PullState.DONE
    assert time.monotonic() - started < 2.0
    assert pull.close()
    assert np.array_equal(ours.groups[0][1:], target.pool.groups[0][1:])
    target.close()
    d.close()


def test_a_target_dead_before_the_first_contact() -> None:
    target = Target(SMALL, 8)
    target.kill()
    d = transport(Pool(SMALL, 8))
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        d.connect(target.description)
    assert caught.value.kind == "connect"
    assert time.monotonic() - started < 2.0
    d.close()


def test_a_target_killed_between_pulls() -> None:
    target, ours = Target(SMALL, 64), Pool(SMALL, 64)
    d = transport(ours)
    peer = d.connect(target.description)
    first = d.pull(peer, [blocks(0, [1], [1])])
    assert done(first) is PullState.DONE
    assert first.close()
    target.kill()
    started = time.monotonic()
    try:
        pull = d.pull(peer, [blocks(0, [2], [2])])
        assert done(pull) is PullState.FAILED
        assert pull.error().kind == "peer_lost"
        until(pull.close)
    except TransferError as error:
        assert error.kind == "peer_lost"
    with pytest.raises(TransferError):
        d.pull(peer, [blocks(0, [3], [3])])
    assert time.monotonic() - started < 2.0
    peer.close()
    d.close()


@pytest.mark.usefixtures("over_tcp")
def test_a_target_killed_in_the_middle_of_a_pull() -> None:
    target, ours = Target(LARGE, 200), Pool(LARGE, 200)
    d = transport(ours)
    peer = d.connect(target.description)
    warm = d.pull(peer, [blocks(0, [1], [1])])
    assert done(warm) is PullState.DONE
    assert warm.close()
    target.signal(signal.SIGSTOP)  # so that it certainly dies in the middle
    pull = d.pull(peer, [blocks(0, np.arange(2, 200), np.arange(2, 200))])
    time.sleep(0.1)
    assert pull.poll() is PullState.RUNNING
    assert not pull.close()
    target.kill()
    assert done(pull, 5.0) is PullState.FAILED
    until(pull.close, 2.0)
    after = ours.groups[0].copy()
    time.sleep(0.2)
    assert np.array_equal(after, ours.groups[0]), "bytes arrived after the pull had been given back"
    peer.close()
    d.close()


@pytest.mark.usefixtures("over_tcp")
def test_a_stopped_target_keeps_the_blocks_until_it_goes_on() -> None:
    target, ours = Target(LARGE, 200), Pool(LARGE, 200)
    d = transport(ours)
    peer = d.connect(target.description)
    warm = d.pull(peer, [blocks(0, [1], [1])])
    assert done(warm) is PullState.DONE
    assert warm.close()
    target.signal(signal.SIGSTOP)
    started = time.monotonic()
    pull = d.pull(peer, [blocks(0, np.arange(2, 200), np.arange(2, 200))])
    assert time.monotonic() - started < 1.0
    peer.close()  # as the inbox does when it gives the peer up
    for _ in range(20):
        assert not pull.close()
        time.sleep(0.01)
    target.signal(signal.SIGCONT)
    until(pull.close, 10.0)
    assert np.array_equal(ours.groups[0][2:], target.pool.groups[0][2:])
    target.close()
    d.close()


def test_standard_output_stays_clean() -> None:
    """UCX reports on standard output unless told otherwise; a command's output belongs to its user."""
    target = Target(SMALL, 8)
    target.kill()
    script = f"""
from pd_serve.transfer.nixl import NixlTransport
from pd_serve.errors import TransferError
import numpy as np
from pd_serve.memory.region import Region
a = np.zeros((8, {SMALL.block_bytes(0)}), np.uint8); b = np.zeros((8, {SMALL.block_bytes(1)}), np.uint8)
t = NixlTransport("quiet")
t.register([Region(x.ctypes.data, x.shape[1], x.shape[0]) for x in (a, b)])
try:
    t.connect({target.description!r})
except TransferError:
    pass
t.close()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, text=True, check=True)
    assert run.stdout == ""
