"""NIXL reads by themselves, not packed: real agents, real bytes, real deaths."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pd_serve.errors import TransferError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.base import PullState
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.nixl import NixlTransport, bindings
from pd_serve.transfer.nixl import transport as nixl_transport
from tests.transfer.harness import LARGE, SMALL, agent_name, until
from tests.transfer.nixl_ends import DIRECT, Node, Session, Target, blocks

pytestmark = pytest.mark.slow


@pytest.fixture
def session() -> Iterator[Session]:
    source, reader = Node(SMALL, 96, 3, DIRECT), Node(SMALL, 80, None, DIRECT)
    made = Session(source, reader)
    yield made
    made.close()
    reader.close()
    source.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_maps_bring_the_right_bytes(session: Session, seed: int) -> None:
    ours, theirs = session.reader.groups, session.source.groups
    rng = np.random.default_rng(seed)
    maps, expected = [], [g.copy() for g in ours]
    for group in range(2):
        count = int(rng.integers(1, 60))
        if seed % 2:  # runs of neighbours, some of them descending
            start = int(rng.integers(1, 20))
            remote = np.concatenate([np.arange(start + 30, start + 20, -1), np.arange(start, start + 15)])
            local = np.concatenate([np.arange(40, 30, -1), np.arange(1, 16)])
        else:
            remote, local = rng.permutation(96)[:count], rng.permutation(80)[:count]
        maps.append(blocks(group, remote, local))
        expected[group][local] = theirs[group][remote]
    pull = session.pull(*maps)
    assert session.finish(pull) == [PullState.DONE]
    assert pull.close()
    assert pull.size_bytes == sum(len(m.local) * SMALL.block_bytes(m.group) for m in maps)
    assert pull.num_descriptors <= sum(len(m.local) for m in maps)
    if seed % 2:
        assert pull.num_descriptors == 4
    for group in range(3):
        assert np.array_equal(ours[group], expected[group])
    assert not session.to_source, "a direct pull needs no word with the source"


def test_a_peer_can_be_left_and_met_again(session: Session) -> None:
    for block in range(1, 4):
        again = Session(session.source, session.reader)
        pull = again.pull(blocks(0, [block], [block]))
        assert again.finish(pull) == [PullState.DONE]
        assert pull.close()
        again.close()
        assert np.array_equal(session.reader.groups[0][block], session.source.groups[0][block])
        with pytest.raises(TransferError):
            again.pull(blocks(0, [block], [block]))
    session.peer.close()
    session.reader.transport.progress()
    assert not session.reader.transport._remotes, "the source was not forgotten"


def test_blocks_outside_of_the_pools_are_refused(session: Session) -> None:
    before = [g.copy() for g in session.reader.groups]
    for remote, local in (([96], [1]), ([1], [80]), ([-1], [1]), ([1], [-1])):
        with pytest.raises(TransferError, match="outside"):
            session.pull(blocks(0, remote, local))
    assert all(np.array_equal(a, b) for a, b in zip(before, session.reader.groups, strict=True))


def test_options_of_the_backend_are_passed_on() -> None:
    NixlTransport(agent_name("o"), HostMover(), "UCX", {"num_workers": "2"}).close()
    with pytest.raises(TransferError, match="nixl_backend"):
        NixlTransport(agent_name("o"), HostMover(), "NOSUCH")


def test_a_pool_that_is_not_the_movers_is_refused() -> None:
    transport = NixlTransport(agent_name("o"), HostMover())
    with pytest.raises(TransferError, match="device 1"):
        transport.register(PoolMemory(1, ()))
    transport.close()


# --- peers in processes of their own


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where reading another process's memory is forbidden: UCX falls back."""
    monkeypatch.setenv("UCX_TLS", "^cma")


@pytest.fixture(params=[True, False], ids=["with a progress thread", "without"])
def threaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reader: beside GPUs it has none."""

    def make(*args: Any, **_: Any) -> bindings.Agent:
        return bindings.Agent(*args, progress_thread=request.param)

    monkeypatch.setattr(nixl_transport, "Agent", make)


def test_reads_while_the_target_computes_with_the_gil_held() -> None:
    target, reader = Target(SMALL, 64, DIRECT), Node(SMALL, 64, None, DIRECT)
    started = time.monotonic()
    peer = target.connect(reader)
    pull = reader.transport.pull(peer, [blocks(0, np.arange(1, 64), np.arange(1, 64))])
    assert target.finish(pull) is PullState.DONE
    assert time.monotonic() - started < 2.0
    assert pull.close()
    assert np.array_equal(reader.groups[0][1:], target.groups[0][1:])
    target.close()
    reader.close()


def test_a_target_dead_before_the_first_contact() -> None:
    target, reader = Target(SMALL, 8), Node(SMALL, 8)
    target.kill()
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        target.connect_silently(reader)
    assert caught.value.kind == "connect"
    assert time.monotonic() - started < 2.0
    reader.close()


@pytest.mark.usefixtures("threaded")
def test_a_target_killed_between_pulls() -> None:
    target, reader = Target(SMALL, 64, DIRECT), Node(SMALL, 64, None, DIRECT)
    peer = target.connect(reader)
    first = reader.transport.pull(peer, [blocks(0, [1], [1])])
    assert target.finish(first) is PullState.DONE
    assert first.close()
    target.kill()
    started = time.monotonic()
    try:
        pull = reader.transport.pull(peer, [blocks(0, [2], [2])])
        assert target.finish(pull) is PullState.FAILED
        assert pull.error().kind == "peer_lost"
        until(pull.close)
    except TransferError as error:
        assert error.kind == "peer_lost"
    with pytest.raises(TransferError):
        reader.transport.pull(peer, [blocks(0, [3], [3])])
    assert time.monotonic() - started < 2.0
    peer.close()
    reader.close()


@pytest.mark.usefixtures("over_tcp", "threaded")
def test_a_target_killed_in_the_middle_of_a_pull() -> None:
    target, reader = Target(LARGE, 200), Node(LARGE, 200)
    peer = target.connect(reader)
    warm = reader.transport.pull(peer, [blocks(0, [1], [1])])
    assert target.finish(warm) is PullState.DONE
    assert warm.close()
    target.signal(signal.SIGSTOP)  # so that it certainly dies in the middle
    pull = reader.transport.pull(peer, [blocks(0, np.arange(2, 200), np.arange(2, 200))])
    time.sleep(0.1)
    assert pull.poll() is PullState.RUNNING
    assert not pull.close()
    target.kill()
    assert target.finish(pull, 5.0) is PullState.FAILED
    until(pull.close, 2.0)
    after = reader.groups[0].copy()
    time.sleep(0.2)
    assert np.array_equal(after, reader.groups[0]), "bytes arrived after the pull had been given back"
    peer.close()
    reader.close()


@pytest.mark.usefixtures("over_tcp")
def test_a_stopped_target_keeps_the_blocks_until_it_goes_on() -> None:
    target, reader = Target(LARGE, 200), Node(LARGE, 200)
    peer = target.connect(reader)
    warm = reader.transport.pull(peer, [blocks(0, [1], [1])])
    assert target.finish(warm) is PullState.DONE
    assert warm.close()
    target.signal(signal.SIGSTOP)
    started = time.monotonic()
    pull = reader.transport.pull(peer, [blocks(0, np.arange(2, 200), np.arange(2, 200))])
    assert time.monotonic() - started < 1.0
    peer.close()  # as the inbox does when it gives the peer up
    for _ in range(20):
        assert not pull.close()
        assert reader.transport.progress() < 1.0
        time.sleep(0.01)
    target.signal(signal.SIGCONT)
    assert reader.transport.progress() < math.inf
    until(pull.close, 10.0)
    assert np.array_equal(reader.groups[0][2:], target.groups[0][2:])
    until(lambda: reader.transport.progress() == math.inf)
    target.close()
    reader.close()


def test_standard_output_stays_clean() -> None:
    """UCX reports on standard output unless told otherwise; a command's output belongs to its user."""
    target = Target(SMALL, 8)
    target.kill()
    script = f"""
from pd_serve.transfer.base import Pair
from pd_serve.transfer.slices import slicings
from pd_serve.errors import TransferError
from tests.transfer.harness import SMALL
from tests.transfer.nixl_ends import Node
node = Node(SMALL, 8)
try:
    pair = Pair(slicings(SMALL, SMALL), node.memory.regions, node.memory.regions)
    node.transport.connect({target.description!r}, pair, print)
except TransferError:
    pass
else:
    raise SystemExit(1)
node.close()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, text=True, check=True)
    assert run.stdout == ""
