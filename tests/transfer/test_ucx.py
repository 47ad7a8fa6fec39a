"""The UCX transport with real ucxx: the right bytes, bounded memory, ends in mid-pull."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.transfer.base import PullState
from pd_serve.transfer.ucx import messages as wire
from pd_serve.transfer.ucx import transport as module
from pd_serve.transfer.ucx.binding import Ucx, Worker
from pd_serve.transfer.ucx.shared import HOST, Limits
from tests.transfer.harness import LARGE, SMALL, Pool
from tests.transfer.ucx_ends import Ends, blocks, expected

# not imported here: what UCX is told must be in the environment by then
pytestmark = pytest.mark.skipif(find_spec("ucxx") is None, reason="pd-serve[ucx] is not installed")


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(Pool(SMALL, 96, seed=3), Pool(SMALL, 80))
    yield made
    made.close()


@pytest.fixture
def large() -> Iterator[Ends]:
    """256 KiB a block: more than one window in 200 blocks."""
    made = Ends(Pool(LARGE, 200, seed=3), Pool(LARGE, 200))
    yield made
    made.close()


@pytest.fixture
def tiny_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many messages, of which few fit into staging."""
    monkeypatch.setattr(module, "HOST", Limits(message_bytes=4096, direct_bytes=3000, window=4, slots=2))


@pytest.mark.parametrize("seed", range(4))
def test_random_maps_bring_the_right_bytes(ends: Ends, seed: int) -> None:
    _random_maps(ends, seed)


@pytest.mark.usefixtures("tiny_messages")
@pytest.mark.parametrize("seed", range(4))
def test_the_right_bytes_in_many_small_messages(seed: int) -> None:
    ends = Ends(Pool(SMALL, 96, seed=3), Pool(SMALL, 80))
    _random_maps(ends, seed)
    assert ends.source.shared.staging._allocated <= 2
    assert ends.reader.shared.staging._allocated <= 2
    ends.close()


def _random_maps(ends: Ends, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps, after = [], [group.copy() for group in ends.reader_pool.groups]
    for group in range(2):
        if seed % 2:  # runs of neighbours, some of them descending
            start = int(rng.integers(1, 20))
            remote = np.concatenate([np.arange(start + 30, start + 20, -1), np.arange(start, start + 15)])
            local = np.concatenate([np.arange(40, 30, -1), np.arange(1, 16)])
        else:
            count = int(rng.integers(1, 60))
            remote, local = rng.permutation(96)[:count], rng.permutation(80)[:count]
        maps.append(blocks(group, remote, local))
        after[group][local] = ends.source_pool.groups[group][remote]
    pull = ends.reader.pull(ends.peer, maps)
    assert ends.finish(pull) is PullState.DONE
    assert pull.close()
    assert pull.size_bytes == sum(len(m.local) * SMALL.block_bytes(m.group) for m in maps)
    for found, wanted in zip(ends.reader_pool.groups, after, strict=True):
        assert np.array_equal(found, wanted)
    ends.until(ends.idle)
    assert ends.source.shared.staging.in_use == ends.reader.shared.staging.in_use == 0


def _layout(block_size: int, heads: int, first_head: int) -> KVLayout:
    return KVLayout(block_size, "float16", (kv_group((0, 1, 2), heads, 32, None, first_head, 4),))


@pytest.mark.parametrize(
    ("source", "reader"),
    [
        (_layout(16, 4, 0), _layout(64, 4, 0)),
        (_layout(64, 4, 0), _layout(16, 4, 0)),
        (_layout(16, 2, 2), _layout(16, 4, 0)),
        (_layout(16, 4, 0), _layout(32, 1, 3)),
    ],
    ids=["block 16 to 64", "block 64 to 16", "TP 2 to 1", "TP 1 to 4 and block 16 to 32"],
)
def test_ends_that_differ_in_block_size_and_tensor_parallelism(source: KVLayout, reader: KVLayout) -> None:
    ends = Ends(Pool(source, 64, seed=3), Pool(reader, 64))
    slicing = ends.pair.slicings[0]
    rng = np.random.default_rng(1)
    item = blocks(
        0,
        rng.permutation(64 * slicing.source.pieces_per_block)[:50],
        rng.permutation(64 * slicing.reader.pieces_per_block)[:50],
    )
    after = expected(slicing, ends.source_pool.groups[0], ends.reader_pool.groups[0], item)
    pull = ends.reader.pull(ends.peer, [item])
    assert ends.finish(pull) is PullState.DONE
    assert pull.close()
    assert np.array_equal(ends.reader_pool.groups[0], after)
    ends.close()


def test_long_runs_take_no_staging_and_short_ones_travel_together(large: Ends) -> None:
    order = np.random.default_rng(0).permutation(np.arange(1, 200))
    pull = large.reader.pull(large.peer, [blocks(0, np.arange(1, 200), order)])
    assert large.finish(pull) is PullState.DONE
    assert np.array_equal(large.reader_pool.groups[0][order], large.source_pool.groups[0][1:])
    assert large.source.shared.staging._allocated == large.reader.shared.staging._allocated == 0
    probe = len(large.pair.slicings) - 1  # 64 KiB a block
    pull = large.reader.pull(large.peer, [blocks(probe, np.arange(64), np.arange(63, -1, -1))])
    assert pull.num_descriptors == 64 * 65536 // HOST.message_bytes
    assert large.finish(pull) is PullState.DONE
    assert np.array_equal(large.reader_pool.probe[::-1], large.source_pool.probe)


def test_pulls_in_flight_together_and_staging_stays_bounded(large: Ends) -> None:
    probe = len(large.pair.slicings) - 1
    order = np.random.default_rng(0).permutation(64)
    pulls = [large.reader.pull(large.peer, [blocks(probe, order, order)]) for _ in range(5)]
    pulls += [large.reader.pull(large.peer, [blocks(0, [at], [at])]) for at in range(1, 40)]
    for pull in pulls:
        assert large.finish(pull) is PullState.DONE
        assert pull.close()
    assert large.reader.shared.staging._allocated <= HOST.slots
    assert large.source.shared.staging._allocated <= HOST.slots
    assert np.array_equal(large.reader_pool.probe, large.source_pool.probe)
    assert np.array_equal(large.reader_pool.groups[0][1:40], large.source_pool.groups[0][1:40])


def test_nothing_is_asked_of_ucx_while_nothing_moves(ends: Ends) -> None:
    ends.until(ends.idle)
    pull = ends.reader.pull(ends.peer, [blocks(0, [1], [2])])
    assert not ends.idle()
    assert ends.finish(pull) is PullState.DONE
    ends.until(ends.idle)


def test_an_empty_pull_is_done(ends: Ends) -> None:
    pull = ends.reader.pull(ends.peer, [blocks(0, [], [])])
    assert pull.poll() is PullState.DONE
    assert pull.close()


def test_pieces_outside_of_the_pools_are_refused(ends: Ends) -> None:
    for remote, local in (([96], [1]), ([1], [80]), ([-1], [1]), ([1], [-1])):
        with pytest.raises(TransferError, match="outside"):
            ends.reader.pull(ends.peer, [blocks(0, remote, local)])
    with pytest.raises(TransferError, match="no group"):
        ends.reader.pull(ends.peer, [blocks(7, [1], [1])])


def test_sessions_one_after_the_other(ends: Ends) -> None:
    for at in range(1, 20):
        pull = ends.reader.pull(ends.peer, [blocks(0, [at], [at])])
        assert ends.finish(pull) is PullState.DONE
        assert np.array_equal(ends.reader_pool.groups[0][at], ends.source_pool.groups[0][at])
        if at % 3 == 0:
            ends.part()
        elif at % 3 == 1:
            ends.peer.close()  # the source has not noticed when the next one begins
        ends.meet()


def test_an_abandoned_pull_gives_its_blocks_back_and_later_ones_work(large: Ends) -> None:
    large.until(large.idle)
    large.source_asleep = True
    pull = large.reader.pull(large.peer, [blocks(0, np.arange(1, 100), np.arange(1, 100))])
    probe = len(large.pair.slicings) - 1
    staged = large.reader.pull(large.peer, [blocks(probe, np.arange(64), np.arange(63, -1, -1))])
    assert pull.close()
    assert staged.close()
    assert pull.error().kind == "cancelled"
    assert large.reader.shared.staging.in_use == 0
    large.source_asleep = False
    later = large.reader.pull(large.peer, [blocks(0, [150], [150])])
    assert large.finish(later) is PullState.DONE
    large.until(large.idle)
    assert np.all(large.reader_pool.groups[0][1:100] == 7), "bytes arrived after the blocks had been given back"
    assert large.source.shared.staging.in_use == 0


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8, 12])
def test_a_pull_that_is_abandoned_while_bytes_move(large: Ends, turns: int) -> None:
    large.until(large.idle)
    order = np.random.default_rng(0).permutation(64)
    probe = len(large.pair.slicings) - 1
    pull = large.reader.pull(
        large.peer, [blocks(0, np.arange(1, 150), np.arange(1, 150)), blocks(probe, order, order[::-1])]
    )
    for _ in range(turns):
        large.turn()
    pull.close()
    large.until(pull.close)
    before = large.reader_pool.groups[0].copy()
    later = large.reader.pull(large.peer, [blocks(0, [170], [170])])
    assert large.finish(later) is PullState.DONE
    large.until(large.idle)
    assert np.array_equal(large.reader_pool.groups[0][:160], before[:160])
    assert large.reader.shared.staging.in_use == large.source.shared.staging.in_use == 0


def test_a_session_that_ends_in_mid_pull_frees_everything_on_both_ends(large: Ends) -> None:
    large.until(large.idle)
    pull = large.reader.pull(large.peer, [blocks(0, np.arange(1, 150), np.arange(1, 150))])
    large.turn()
    large.turn()
    large.peer.close()
    assert pull.poll() is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    large.until(pull.close)
    with pytest.raises(TransferError):
        large.reader.pull(large.peer, [blocks(0, [1], [1])])
    large.served.close()
    large.until(large.idle)
    assert not large.reader._sessions()
    assert not large.source._sessions()
    assert large.reader.shared.staging.in_use == large.source.shared.staging.in_use == 0


def test_a_source_that_gives_up_says_why(large: Ends) -> None:
    large.until(large.idle)
    large.source_asleep = True
    pull = large.reader.pull(large.peer, [blocks(0, [1], [1])])
    large.peer.receive(wire.encode(wire.Gone("out of order")))
    assert pull.poll() is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    assert "out of order" in str(pull.error())
    large.until(pull.close)


def test_nonsense_is_refused(ends: Ends) -> None:
    with pytest.raises(HandshakeError, match="cannot be read"):
        ends.reader.connect(b"\x93\x01\x02\x03", ends.pair, ends.to_source.append)
    for description, why in (
        (wire.Description(99, bytes(16), 0, 1, 1), "version 99"),
        (wire.Description(wire.VERSION, bytes(16), 1, 1, 1), "damaged"),
        (wire.Description(wire.VERSION, b"", 0, 1, 1), "cannot be read"),
    ):
        with pytest.raises(HandshakeError, match=why):
            ends.source.serve(wire.encode(description), ends.pair, ends.to_reader.append)
    with pytest.raises(TransferError):
        ends.peer.receive(b"\xff")
    piece = np.array([1], dtype="<i4").tobytes()
    for nonsense in (
        b"",
        b"\xc1garbage",
        wire.encode(wire.Wants([wire.Want(1, 0, b"abc")])),
        wire.encode(wire.Wants([wire.Want(1, 0, b"")])),
        wire.encode(wire.Wants([wire.Want(1, 9, piece)])),
        wire.encode(wire.Wants([wire.Want(1, 0, np.array([5000], dtype="<i4").tobytes())])),
        wire.encode(wire.Wants([wire.Want(1, 0, np.array([-1], dtype="<i4").tobytes())])),
        wire.encode(wire.Wants([wire.Want(1, 0, piece)] * 1000)),
        wire.encode(wire.Wants([wire.Want(1, 0, piece * 100_000)])),
        wire.encode(wire.Open(0)),
    ):
        with pytest.raises(TransferError):
            ends.served.receive(nonsense)
    ends.until(ends.idle)
    with pytest.raises(TransferError, match="twice"):
        ends.served.receive(wire.encode(wire.Open(5)))
    fresh = ends.source.serve(ends.reader.describe(), ends.pair, ends.to_reader.append)
    with pytest.raises(TransferError, match="before it opened"):
        fresh.receive(wire.encode(wire.Wants([wire.Want(1, 0, piece)])))


def test_messages_that_nobody_asked_for_are_thrown_away(ends: Ends) -> None:
    stranger = Worker(Ucx(), on_device=False)
    endpoint = stranger.connect(ends.reader._worker.address)
    junk = np.ones(1 << 20, dtype=np.uint8)
    sizes = (8, 5000, junk.nbytes)
    sent = [endpoint.send(junk.ctypes.data, n, 2**63 + n, on_device=False) for n in sizes]
    for at in range(1, 2000):
        stranger.progress(1e-3)
        if at % 20 == 0:
            pull = ends.reader.pull(ends.peer, [blocks(0, [at % 90], [at % 70])])
            assert ends.finish(pull) is PullState.DONE
        if all(operation.ended() for operation in sent):
            break
    assert all(operation.ended() for operation in sent)
    ends.until(ends.idle)
    endpoint.close()
    stranger.progress(1e-3)


def test_it_lives_beside_nixl_and_leaves_the_environment_alone() -> None:
    """Both copies of UCX in one process, in both orders, and both move bytes."""
    script = """
import os, sys
from collections import deque
from tests.transfer.ucx_ends import Ends, blocks, pair_of
from tests.transfer.harness import SMALL, Pool, agent_name
from pd_serve.transfer.base import PullState
def ucx():
    before = {k: v for k, v in os.environ.items() if k.startswith("UCX")}
    ends = Ends(Pool(SMALL, 96, seed=3), Pool(SMALL, 80))
    pull = ends.reader.pull(ends.peer, [blocks(0, [5], [6])])
    assert ends.finish(pull) is PullState.DONE
    assert before == {k: v for k, v in os.environ.items() if k.startswith("UCX")}
    return ends
def nixl():
    from pd_serve.transfer.movers.host import HostMover
    from pd_serve.transfer.nixl import NixlTransport
    pools = Pool(SMALL, 96, seed=3), Pool(SMALL, 80)
    pair = pair_of(SMALL, SMALL, pools[0].memory(), pools[1].memory())
    source, reader = (NixlTransport(agent_name(n), HostMover(), "UCX", {}) for n in "pd")
    queues = deque(), deque()
    for transport, pool in zip((source, reader), pools):
        transport.register(pool.memory())
    served = source.serve(reader.describe(), pair, queues[1].append)
    peer = reader.connect(source.describe(), pair, queues[0].append)
    pull = reader.pull(peer, [blocks(0, [5], [6])])
    while pull.poll() is PullState.RUNNING:
        for queue, end in zip(queues, (served, peer)):
            while queue:
                end.receive(queue.popleft())
        source.progress(); reader.progress()
    assert pull.poll() is PullState.DONE and pull.close()
    assert (pools[0].groups[0][5] == pools[1].groups[0][6]).all()
    return source, reader, pools
made = [globals()[name]() for name in sys.argv[1:]]
made += [ucx(), nixl()]
for ends in made:
    for end in ends[:2] if isinstance(ends, tuple) else [ends]:
        end.close()
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, *order], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for order in (["ucx", "nixl"], ["nixl", "ucx"])
    ]
    for run in runs:
        out, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
        assert out == ""


def test_without_ucxx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libucxx", "ucxx", "ucxx._lib"):
        monkeypatch.setitem(sys.modules, name, None)
    from pd_serve.transfer.movers.host import HostMover
    from pd_serve.transfer.ucx import UcxTransport

    with pytest.raises(TransferError, match=r"pd-serve\[ucx\]"):
        UcxTransport(HostMover())
