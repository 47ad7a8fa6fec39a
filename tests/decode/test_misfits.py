"""Sources that a decode node cannot read from, or should not even dial: what it says of them, when it tries again."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pd_serve.auth import Seal
from pd_serve.decode.inbox import Failed, Offered
from pd_serve.errors import FailureKind
from pd_serve.transfer.session import peers as module
from pd_serve.transfer.session import source_peer as peer
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Reception
from pd_serve.wire import peer as wire
from pd_serve.wire.link import Source
from tests.transfer.frames import Frames
from tests.transfer.harness import SMALL, Clock, DecodeEnd, PrefillEnd, identity, until
from tests.transfer.scripted import Script, copy_lanes

TABLES = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Reader(DecodeEnd):
    """A decode end on a clock of the test's."""

    def __init__(self, clock: Clock, script: Script | None = None, **me: Any) -> None:
        lane = script or Script()
        super().__init__(clock=clock, me=me, lanes=lambda memory: copy_lanes(memory, copy=lane))
        self.clock = clock

    def later(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.worker.wake()

    def settle(self) -> None:
        """All calls so far have been made, and what they led to at once is over."""
        done = threading.Event()
        self.worker.call(done.set)
        assert done.wait(5)

    def paused(self, source: Source) -> None:
        until(lambda: self.peer(source).state is peer.State.PAUSED)
        self.settle()

    def counter(self, name: str) -> float:
        return self.inbox.counters()[name]

    def peer(self, source: Source) -> peer.SourcePeer:
        return self.inbox._peers[source.addresses[0]]


@pytest.fixture
def d(clock: Clock) -> Iterator[Reader]:
    made = Reader(clock)
    yield made
    made.close()
    assert made.worker.internal_errors == 0


@pytest.fixture
def p() -> Iterator[PrefillEnd]:
    made = PrefillEnd(lanes=copy_lanes, me={"model": "other"})
    yield made
    made.close()


def test_a_refused_source_is_told_and_tried_again_with_growing_pauses(d: Reader, p: PrefillEnd) -> None:
    assert d.inbox.misfits() == {}
    d.inbox.connect(p.source)
    until(lambda: d.inbox.misfits())
    d.paused(p.source)
    assert list(d.inbox.misfits()) == ["P"] and "models differ" in d.inbox.misfits()["P"]
    assert select.select([d.inbox.fileno()], [], [], 5)[0], "the main thread is not woken"
    pause_s = peer.RETRY_MISFIT_S
    for trial in range(2, 10):
        d.later(pause_s - 0.01)
        d.inbox.connect(p.source)  # naming it does not hurry it
        d.settle()
        assert d.counter("handshakes_refused") == trial - 1
        d.later(0.01)
        until(lambda n=trial: d.counter("handshakes_refused") == n)
        d.paused(p.source)
        pause_s = min(peer.RETRY_MAX_S, 2 * pause_s)
    assert pause_s == peer.RETRY_MAX_S
    d.inbox.expect("k", p.source)  # not kept waiting for a minute
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE
    assert "models differ" in failed.message and "tried again in 60 s" in failed.message


def test_a_trial_that_succeeds_clears_it(clock: Clock) -> None:
    script = Script(corrupts=True)
    d, p = Reader(clock, script), PrefillEnd(lanes=copy_lanes)
    d.inbox.connect(p.source)
    until(lambda: "has passed its test" in d.inbox.misfits().get("P", ""))
    d.paused(p.source)  # the next trial has its time
    script.corrupts = False
    d.later(peer.RETRY_MISFIT_S)
    until(lambda: d.counter("handshakes") == 1 and not d.inbox.misfits())
    rates = until(d.inbox.lanes)
    assert list(rates) == ["P"] and rates["P"] > 0
    p.close()
    until(lambda: not d.inbox.lanes())
    d.close()


def test_one_whose_pulls_fail_again_and_again(clock: Clock) -> None:
    script = Script()
    d, p = Reader(clock, script), PrefillEnd(lanes=copy_lanes)
    d.inbox.connect(p.source)
    for number in range(1, peer.FAILURES_TOLERATED + 2):
        until(lambda n=number: d.counter("handshakes") == n)
        assert until(lambda: not d.inbox.misfits())  # each trial that passes its test is one
        script.fails = "cut off"
        key = f"k{number}"
        d.inbox.expect(key, p.source)
        p.outbox.open(key)
        p.publish(key, 16, TABLES, token=1)
        d.wait(key, Offered)
        d.accept(key, TABLES)
        d.wait(key, Failed)
        d.paused(p.source)
        script.fails = ""
        if number >= peer.FAILURES_TOLERATED:
            assert f"{number} pulls in a row" in until(lambda: d.inbox.misfits().get("P", ""))
        d.later(2.0)
    d.close()
    p.close()


def test_one_that_does_not_answer_for_long_is_told(d: Reader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        source = Source("P", "e", (f"tcp://127.0.0.1:{nobody.getsockname()[1]}",))
    d.inbox.connect(source)
    d.settle()
    pause_s = peer.RETRY_MIN_S
    for failures in range(1, 7):
        until(lambda n=failures: d.peer(source)._failures == n)
        d.settle()
        waited_s = peer.RETRY_MIN_S * (2 ** (failures - 1) - 1)
        assert bool(d.inbox.misfits()) == (waited_s >= peer.UNREACHABLE_S), "it may be about to start anew"
        if failures < 6:
            d.later(pause_s)
            pause_s *= 2
    assert not d.inbox.misfits()
    d.later(pause_s)
    until(lambda: "nobody listens" in d.inbox.misfits().get("P", ""))
    d.settle()
    d.later(module.FORGET_MISFIT_S)
    until(lambda: not d.inbox.misfits() and not len(d.inbox._peers))


def test_another_epoch_or_another_address_is_tried_at_once(d: Reader, p: PrefillEnd) -> None:
    d.inbox.connect(p.source)
    until(lambda: d.inbox.misfits())
    d.paused(p.source)
    d.inbox.connect(Source("P", "new", p.source.addresses))
    until(lambda: d.counter("handshakes_refused") == 2)
    d.inbox.expect("waits", Source("P", "new", p.source.addresses))  # for the trial in a second
    good = PrefillEnd(lanes=copy_lanes)
    d.inbox.connect(good.source)
    until(lambda: d.counter("handshakes") == 1)
    assert d.inbox.misfits() == {}
    assert d.wait("waits", Failed).kind is FailureKind.PEER_LOST
    assert list(d.inbox._peers) == [*good.source.addresses]
    good.close()


def test_sources_are_bounded(d: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SOURCES", 2)
    ends = [PrefillEnd(lanes=copy_lanes, me={"node_id": f"P{i}"}) for i in range(4)]
    for i, end in enumerate(ends[:2]):
        d.inbox.expect(f"k{i}", end.source)
        d.later(1.0)
    until(lambda: d.counter("handshakes") == 2)
    d.inbox.expect("k2", ends[2].source)
    failed = d.wait("k2", Failed)
    assert failed.kind is FailureKind.CONNECT and "2 prefill nodes" in failed.message
    d.inbox.cancel("k0")
    d.inbox.connect(ends[3].source)
    until(lambda: d.counter("handshakes") == 3)
    assert list(d.inbox._peers) == [*ends[1].source.addresses, *ends[3].source.addresses]
    assert d.ends("k1") == []
    for end in ends:
        end.close()


# --- who is dialled, and what it hears


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:9", "tcp://[2001:db8::1]:9", "tcp://0.0.0.0:9"])
def test_without_a_secret_only_this_machine_is_dialled(d: Reader, address: str) -> None:
    d.inbox.expect("k", Source("P", "e", (address,)))
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE
    assert "--secret-file" in failed.message and "--allow-insecure-nodes" in failed.message
    assert "--allow-insecure-nodes" in d.inbox.misfits()["P"]
    assert d.peer(Source("P", "e", (address,)))._wire is None


def test_with_a_secret_other_machines_are_dialled(clock: Clock) -> None:
    d = Reader(clock, secret=b"s")
    d.inbox.expect("k", Source("P", "e", ("tcp://192.0.2.1:9",)))
    until(lambda: d.find("k", Failed) or any(one._wire for one in map(d.inbox._peers.get, d.inbox._peers)))
    d.later(HANDSHAKE_S)
    assert d.wait("k", Failed).kind is FailureKind.CONNECT
    d.close()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "tcp://127.0.0.1:9/x", "tcp://u@127.0.0.1:9", "ipc:///x", ""]
)
def test_addresses_of_another_form_are_not_dialled(d: Reader, address: str) -> None:
    d.inbox.expect("k", Source("P", "e", (address,)))
    assert "not of the form tcp://host:port" in d.wait("k", Failed).message


@pytest.mark.parametrize("host", ["a" * 300, "..", "h\u2603st.invalid"])
def test_names_that_no_host_has_fail_at_once(host: str) -> None:
    d = Reader(Clock(), secret=b"s")
    d.inbox.expect("k", Source("P", "e", (f"tcp://{host}:9",)))
    assert d.wait("k", Failed).kind is FailureKind.CONNECT
    d.close()


@pytest.mark.parametrize("secret", [b"", b"s3cret"])
def test_a_stranger_that_is_dialled_hears_a_nonce_and_no_more(clock: Clock, secret: bytes) -> None:
    """A pool's addresses, NIXL's metadata, node id and epoch are for those who have proved the secret."""
    d = Reader(clock, secret=secret)
    with socket.create_server(("127.0.0.1", 0)) as server:
        d.inbox.connect(Source("P", "e", (f"tcp://127.0.0.1:{server.getsockname()[1]}",)))
        stranger = Frames(server.accept()[0])
    hello = wire.decode_to_source(stranger.receive())
    assert isinstance(hello, wire.Hello) and len(wire.encoder.encode(hello)) < 100
    d.close()
    with pytest.raises(EOFError):
        stranger.receive()  # not even a goodbye
    stranger.close()


def test_a_stranger_that_talks_without_end_is_left(d: Reader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        d.inbox.expect("k", Source("P", "e", (f"tcp://127.0.0.1:{server.getsockname()[1]}",)))
        stranger = Frames(server.accept()[0])
    stranger.raw.sendall(bytes(4) * 1000)  # empty frames
    assert "does not speak this protocol" in d.wait("k", Failed).message
    assert d.counter("garbage_frames") == peer.MAX_UNPROVED_FRAMES
    stranger.close()


def test_a_message_put_in_on_its_way_ends_the_session(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    d = Reader(clock, secret=b"s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        d.inbox.expect("k", Source("P", "e", (f"tcp://127.0.0.1:{server.getsockname()[1]}",)))
        source = Frames(server.accept()[0])
    frame = source.receive()
    hello = wire.decode_to_source(frame)
    assert isinstance(hello, wire.Hello)
    reception = Reception(identity("P", SMALL, secret=b"s3cret"), hello, frame)
    source.send(wire.encoder.encode(reception.challenge))
    proof = wire.decode_to_source(source.receive())
    assert isinstance(proof, wire.Proof)
    reception.check(proof)
    source.seal(reception)
    assert isinstance(wire.decode_to_source(source.receive()), wire.Introduction)  # sealed
    source.outgoing = Seal()
    source.send(wire.encoder.encode(wire.Bye("e")) + os.urandom(16))
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.PEER_LOST and "MAC does not hold" in failed.message
    assert d.counter("forged_frames") == 1
    assert any("MAC does not hold" in r.getMessage() for r in caplog.records)
    source.close()
    d.close()
