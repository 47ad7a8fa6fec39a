"""UCX between two processes: rates do not matter here, deaths do."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from pd_serve.errors import TransferError
from pd_serve.transfer.base import PullState
from pd_serve.transfer.ucx.reader import UcxPull
from tests.transfer.harness import LARGE
from tests.transfer.ucx_ends import Target, blocks

# not imported here: what UCX is told must be in the environment by then
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ucxx") is None, reason="pd-serve[ucx] is not installed")]

NUM_BLOCKS = 200  # of 256 KiB


@pytest.fixture(params=["all", "tcp"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Over shared memory, and as between two machines."""
    monkeypatch.setenv("UCX_TLS", request.param)
    made = Target(LARGE, NUM_BLOCKS, UCX_TLS=request.param)
    warm = made.reader.pull(made.peer, [blocks(0, [1], [1])])
    assert made.finish(warm) is PullState.DONE
    assert warm.close()
    yield made
    made.close()


def test_bytes_come_and_both_ends_are_idle_after(target: Target) -> None:
    order = np.random.default_rng(0).permutation(np.arange(2, NUM_BLOCKS))
    pull = target.reader.pull(target.peer, [blocks(0, order, order)])
    assert target.finish(pull) is PullState.DONE
    assert pull.close()
    assert np.array_equal(target.ours.groups[0][2:], target.pool.groups[0][2:])
    target.until(lambda: target.reader.progress() == float("inf"))
    before = target.ask("cpu")
    time.sleep(0.5)
    assert target.ask("cpu") - before < 0.05  # it had been told to answer twice


def _stopped_in_mid_pull(target: Target) -> UcxPull:
    pull = target.reader.pull(target.peer, [blocks(0, np.arange(2, NUM_BLOCKS), np.arange(2, NUM_BLOCKS))])
    target.until(lambda: bool(pull.waiting) and len(pull.waiting) < pull.num_descriptors - 20)
    target.signal(signal.SIGSTOP)
    for _ in range(20):
        target.reader.progress()
        time.sleep(0.002)
    assert pull.poll() is PullState.RUNNING
    return pull


def test_a_source_killed_in_mid_pull(target: Target) -> None:
    pull = _stopped_in_mid_pull(target)
    target.kill()
    assert target.finish(pull) is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    target.until(pull.close)
    with pytest.raises(TransferError):
        target.reader.pull(target.peer, [blocks(0, [1], [1])])
    target.until(lambda: not target.reader._sessions())
    assert target.reader.shared.staging.in_use == 0


def test_a_stopped_source_keeps_no_blocks_once_its_session_has_ended(target: Target) -> None:
    pull = _stopped_in_mid_pull(target)
    pull.close()
    target.peer.close()
    target.until(pull.close, 2.0)
    before = target.ours.groups[0].copy()
    target.signal(signal.SIGCONT)
    for _ in range(200):
        target.reader.progress()
        time.sleep(0.001)
    assert np.array_equal(before, target.ours.groups[0]), "bytes arrived after the blocks had been given back"


def test_a_stopped_source_that_goes_on(target: Target) -> None:
    pull = _stopped_in_mid_pull(target)
    target.signal(signal.SIGCONT)
    assert target.finish(pull) is PullState.DONE
    assert np.array_equal(target.ours.groups[0][2:], target.pool.groups[0][2:])


def test_a_source_killed_between_pulls(target: Target) -> None:
    target.kill()
    pull = target.reader.pull(target.peer, [blocks(0, [2], [2])])
    assert target.finish(pull) is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    target.until(pull.close)


def test_a_reader_that_stops_answering_leaves_nothing_at_the_source(target: Target) -> None:
    """The source sends to a worker that makes no progress any more; its endpoint then breaks, or its session ends."""
    probe = len(target.pair.slicings) - 1
    order = np.random.default_rng(0).permutation(64)[:48]
    target.reader.pull(target.peer, [blocks(probe, order, order)])
    deadline = time.monotonic() + 5
    while target.ask_quietly("staging") == 0:
        assert time.monotonic() < deadline
    time.sleep(0.05)
    assert target.ask_quietly("staging") > 0
    target.ask_quietly("close")
    deadline = time.monotonic() + 5
    while target.ask_quietly("staging") != 0:
        assert time.monotonic() < deadline
