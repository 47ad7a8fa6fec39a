"""Prefill nodes in processes of their own: killed, stopped, busy. And decode nodes that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Drained, Failed, Offered
from pd_serve.errors import FailureKind
from pd_serve.wire.link import Source
from tests.transfer.harness import LARGE, DecodeEnd, PrefillEnd, PrefillProcess, until
from tests.transfer.processes import start

pytestmark = pytest.mark.slow

NUM_BLOCKS = 200
THEIRS = [list(range(199, 0, -1))]
OURS = [list(range(1, 200))]
NUM_TOKENS = 199 * 16


@pytest.fixture
def p() -> Iterator[PrefillProcess]:
    made = PrefillProcess(LARGE, NUM_BLOCKS)
    yield made
    made.close()


def decode(**options: float) -> DecodeEnd:
    return DecodeEnd(LARGE, NUM_BLOCKS, **options)  # type: ignore[arg-type]


@pytest.fixture
def d() -> Iterator[DecodeEnd]:
    made = decode()
    yield made
    made.close()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading another process's memory is forbidden: UCX falls back, and the target must take part."""
    monkeypatch.setenv("UCX_TLS", "^cma")


def same_bytes(p: PrefillProcess, d: DecodeEnd) -> bool:
    return np.array_equal(d.pool.groups[0][OURS[0]], p.pool.groups[0][THEIRS[0]])


def test_killed_before_anything_was_ready(p: PrefillProcess, d: DecodeEnd) -> None:
    p.ask("open", "k")
    d.inbox.expect("k", p.source)
    until(lambda: d.inbox.counters()["handshakes"])
    p.kill()
    started = time.monotonic()
    assert d.wait("k", Failed, 5.0).kind is FailureKind.PEER_LOST
    d.wait("k", Drained)
    assert time.monotonic() - started < 1.0
    d.inbox.expect("again", p.source)
    assert d.wait("again", Failed, 5.0).kind is FailureKind.CONNECT


def test_killed_between_two_chunks(p: PrefillProcess, d: DecodeEnd) -> None:
    p.ask("open", "k")
    d.inbox.expect("k", p.source)
    p.ask("publish", "k", 1600, [THEIRS[0][:100]])
    d.wait("k", Offered)
    d.accept("k", OURS)
    until(lambda: d.inbox.counters()["pulls"])
    p.kill()
    assert d.wait("k", Failed, 5.0).kind is FailureKind.PEER_LOST
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


@pytest.mark.usefixtures("over_tcp")
def test_killed_in_the_middle_of_a_transfer() -> None:
    p, d = PrefillProcess(LARGE, NUM_BLOCKS), decode()
    p.ask("open", "warm")
    d.inbox.expect("warm", p.source)
    p.ask("publish", "warm", 16, [[1]], 0, 1)
    d.wait("warm", Offered)
    d.accept("warm", [[1]])
    d.wait("warm", Arrived)
    p.ask("open", "k")
    d.inbox.expect("k", p.source)
    p.ask("publish", "k", NUM_TOKENS, THEIRS, 0, 5)
    d.wait("k", Offered)
    p.signal(signal.SIGSTOP)  # so that it certainly dies in the middle
    d.accept("k", OURS)
    time.sleep(0.2)
    assert d.ends("k") == []
    p.kill()
    assert d.wait("k", Failed, 5.0).kind in (FailureKind.PEER_LOST, FailureKind.TRANSFER)
    d.wait("k", Drained, 5.0)
    after = d.pool.groups[0].copy()
    time.sleep(0.2)
    assert np.array_equal(after, d.pool.groups[0]), "bytes came after Drained"
    p.close()
    d.close()


def test_killed_after_the_transfer(p: PrefillProcess, d: DecodeEnd) -> None:
    p.ask("open", "k")
    d.inbox.expect("k", p.source)
    p.ask("publish", "k", NUM_TOKENS, THEIRS, 0, 5)
    d.wait("k", Offered)
    d.accept("k", OURS)
    d.wait("k", Arrived)
    p.kill()
    time.sleep(0.3)
    assert d.ends("k") == [Arrived]
    assert same_bytes(p, d)


def test_stopped_and_continued(p: PrefillProcess, d: DecodeEnd) -> None:
    """Stopped before the reader's first contact, for a second: the request arrives all the same."""
    p.ask("open", "k")
    p.ask("publish", "k", NUM_TOKENS, THEIRS, 0, 5)
    p.signal(signal.SIGSTOP)
    d.inbox.expect("k", p.source)
    time.sleep(1.0)
    assert d.take() == []
    p.signal(signal.SIGCONT)
    d.wait("k", Offered)
    d.accept("k", OURS)
    d.wait("k", Arrived)
    assert same_bytes(p, d)
    assert until(lambda: p.ask("why", "k")) == "released"


@pytest.mark.usefixtures("over_tcp")
def test_stopped_for_too_long_keeps_the_blocks_until_nothing_can_write_them() -> None:
    p, d = PrefillProcess(LARGE, NUM_BLOCKS), decode(pull_timeout_s=0.5)
    p.ask("open", "k")
    d.inbox.expect("k", p.source)
    p.ask("publish", "k", NUM_TOKENS, THEIRS, 0, 5)
    d.wait("k", Offered)
    p.signal(signal.SIGSTOP)
    d.accept("k", OURS)
    failed = d.wait("k", Failed, 5.0)
    assert failed.kind is FailureKind.TIMEOUT
    time.sleep(0.3)
    assert d.ends("k") == [Failed]  # not drained: the read is still under way
    p.signal(signal.SIGCONT)
    d.wait("k", Drained)
    after = d.pool.groups[0].copy()
    time.sleep(0.2)
    assert np.array_equal(after, d.pool.groups[0]), "bytes came after Drained"
    assert until(lambda: p.ask("why", "k")) == "declined"
    p.close()
    d.close()


@pytest.mark.parametrize("tls", ["", "^cma"])
def test_the_target_computes_all_the_while(tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First contact, chunks and release, while the target's main thread computes and mostly holds the GIL."""
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    p, d = PrefillProcess(LARGE, NUM_BLOCKS), decode()
    p.ask("open", "k")
    p.ask("publish", "k", NUM_TOKENS, THEIRS, 0, 5)
    p.tell("busy", 2.0)
    started = time.monotonic()
    d.inbox.expect("k", p.source)
    d.wait("k", Offered)
    d.accept("k", OURS)
    d.wait("k", Arrived)
    assert time.monotonic() - started < 1.8, "the transfer waited for the target's main thread"
    assert same_bytes(p, d)
    assert p.wait() == "busy"
    p.close()
    d.close()


def _claim_and_wait(pipe: Connection, source: Source) -> None:
    d = DecodeEnd(LARGE, 8)
    d.inbox.expect("k", source)
    d.wait("k", Offered)
    pipe.send("offered")
    pipe.recv()
    os._exit(0)


def test_a_killed_decode_node_holds_no_lease() -> None:
    p = PrefillEnd(LARGE, 8)
    p.outbox.open("k")
    p.publish("k", 32, [[1, 2]], token=1)
    process, pipe = start(_claim_and_wait, p.source)
    assert pipe.poll(20) and pipe.recv() == "offered"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(5)
    assert until(lambda: p.why("k"), 2.0) == "peer_lost"
    p.close()
