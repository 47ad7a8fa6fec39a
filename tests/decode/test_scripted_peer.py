"""An inbox against a prefill node that misbehaves: silence, nonsense, another epoch at the same address."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Drained, Failed, Offered
from pd_serve.errors import FailureKind
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.session import probe
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Reception
from pd_serve.wire import peer as wire
from pd_serve.wire.link import Source
from tests.transfer.frames import Frames
from tests.transfer.harness import SMALL, Clock, DecodeEnd, Pool, identity, until
from tests.transfer.scripted import Script, copy_lanes


class Scripted:
    """A socket that answers a handshake properly and everything else as the test says."""

    def __init__(self) -> None:
        self.pool = Pool(SMALL, 64, seed=2)
        self.mover = HostMover()
        self.renew()
        self.before: dict[type, list[wire.ToReader | bytes]] = {}  # said before the answer to a message of this kind
        self.answers_handshakes = True
        self.answers_heartbeats = True
        self.release_valid = True
        self.heard: list[wire.ToSource] = []
        self._stop = False
        self._port = 0
        self.open()

    def renew(self) -> None:
        self.identity = identity("S", SMALL, checksums=False)
        probe.fill(self.pool.memory(), self.mover, self.identity.epoch)

    @property
    def source(self) -> Source:
        return Source("S", self.identity.epoch, (f"tcp://127.0.0.1:{self._port}",))

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._listener.settimeout(0.005)
        self._stop = False
        self._outbound: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def say(self, message: wire.ToReader | bytes) -> None:
        self._outbound.append(message if isinstance(message, bytes) else wire.encoder.encode(message))

    def wait_for(self, kind: type) -> None:
        until(lambda: any(isinstance(m, kind) for m in self.heard))

    def _serve(self) -> None:
        """The newest connection is the one that is spoken to."""
        peer: Frames | None = None
        while not self._stop:
            with contextlib.suppress(TimeoutError):
                peer = Frames(self._listener.accept()[0])
            if peer is None:
                continue
            while self._outbound:
                with contextlib.suppress(OSError):
                    peer.send(self._outbound.pop(0))
            if not peer.poll(0.002):
                continue
            try:
                frame = peer.receive()
            except EOFError:
                peer.close()
                peer = None
                continue
            message = wire.decode_to_source(frame)
            self.heard.append(message)
            for early in self.before.get(type(message), []):
                self.say(early)
            match message:
                case wire.Hello() if self.answers_handshakes:
                    reception = Reception(self.identity, message, frame)
                    self.say(reception.challenge)
                case wire.Proof() if self.answers_handshakes:
                    reception.check(message)
                case wire.Introduction() if self.answers_handshakes:
                    regions = self.pool.memory().regions
                    self.say(reception.welcome(message, regions, {"copy": b"copy"}, {}, 30.0))
                case wire.Heartbeat() if self.answers_heartbeats:
                    self.say(wire.HeartbeatAck(message.seq, []))
                case wire.Release(done=True):
                    self.say(wire.Released(message.key, self.release_valid))
        self._listener.close()
        if peer is not None:
            peer.close()

    def shut(self) -> None:
        self._stop = True
        self._thread.join()

    def close(self) -> None:
        self.shut()


@pytest.fixture
def s() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def d(clock: Clock) -> Iterator[DecodeEnd]:
    made = DecodeEnd(clock=clock, lanes=copy_lanes)
    yield made
    made.close()
    assert made.worker.internal_errors == 0


def ready(num_tokens: int, ids: list[int], token: int | None = None, group: int = 0, first: int = 0) -> wire.Ready:
    blocks = wire.Blocks(group, first, np.array(ids, dtype="<i4").tobytes())
    return wire.Ready("k", num_tokens, [blocks], None if token is None else wire.First(token))


TABLES = [[1, 2, 3, 4], [0, 0, 0, 0]]


def test_silence(s: Scripted, d: DecodeEnd, clock: Clock) -> None:
    s.answers_heartbeats = False
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    for _ in range(6):  # a heartbeat every 5 s
        clock.now_s += 5
        d.worker.wake()
        s.wait_for(wire.Heartbeat)
    assert d.ends("k") == []  # a pause shorter than the lease harms nothing
    clock.now_s += 5
    d.worker.wake()
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.PEER_LOST
    assert "heartbeats" in failed.message
    d.wait("k", Drained)


@pytest.mark.parametrize(
    "nonsense",
    [
        ready(4, [0]),
        ready(4, [-3]),
        ready(4, [1], group=7),
        wire.Ready("k", 4, [wire.Blocks(0, 0, b"\1\0")]),
        ready(16, [1, 2, 3, 64], token=1),  # the last is outside of the peer's pool
        ready(16, [1, 2, 3], token=1),  # one is missing
        ready(20, [1, 2, 3, 4, 5], token=1),  # more than has a place here
    ],
)
def test_nonsense_fails_closed(s: Scripted, d: DecodeEnd, nonsense: wire.Ready) -> None:
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    s.say(nonsense)

    def failed() -> Failed | None:
        if d.find("k", Offered):
            d.accept("k", TABLES)
        return d.find("k", Failed)

    assert until(failed).kind is FailureKind.TRANSFER
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]
    assert not any(isinstance(m, wire.Release) and m.done for m in s.heard)


def test_an_invalid_release(s: Scripted, d: DecodeEnd) -> None:
    s.release_valid = False
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    s.say(ready(16, [1, 2, 3, 4], token=1))
    d.wait("k", Offered)
    d.accept("k", TABLES)
    assert d.wait("k", Failed).kind is FailureKind.EXPIRED
    assert d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


def test_garbage_and_strangers(s: Scripted, d: DecodeEnd) -> None:
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    for frame in (b"", b"\xff\xff", b"\x81\xa4type\xa4nope"):
        s.say(frame)
    s.say(wire.Released("k", valid=True))  # nothing was released
    s.say(wire.Released("unknown", valid=True))
    s.say(wire.HeartbeatAck(77, ["unknown"]))
    s.say(wire.Cancel("unknown", "?"))
    s.say(ready(16, [1, 2, 3, 4], token=6))
    s.say(ready(16, [1, 2, 3, 4], token=6))  # told twice
    d.wait("k", Offered)
    d.accept("k", TABLES)
    assert d.wait("k", Arrived).first_token == 6
    assert d.inbox.counters()["garbage_frames"] == 3
    assert np.array_equal(d.pool.groups[0][1:5], s.pool.groups[0][1:5])


def test_a_new_epoch_at_the_same_address(s: Scripted, d: DecodeEnd, clock: Clock) -> None:
    before = s.source
    d.inbox.expect("k", before)
    s.wait_for(wire.Claim)
    s.say(ready(8, [1, 2]))
    d.wait("k", Offered)
    s.shut()
    assert d.wait("k", Failed, 2.0).kind is FailureKind.PEER_LOST
    s.renew()
    s.open()
    clock.now_s += 10  # the pause before the next attempt
    d.worker.wake()
    until(lambda: d.inbox.counters()["handshakes"] == 2)
    d.inbox.expect("late", before)
    assert d.wait("late", Failed).kind is FailureKind.PEER_LOST
    d.inbox.expect("new", s.source)
    until(lambda: any(isinstance(m, wire.Claim) and m.key == "new" for m in s.heard))
    assert d.ends("new") == []


# --- the handshake


WELCOME = wire.Welcome("S", "e", 0, 1, SMALL, [], {}, {}, 30.0, checksums=False)
EVERYTHING: list[wire.ToReader | bytes] = [
    b"",
    os.urandom(100),
    WELCOME,
    wire.LaneMessage("copy", b"early"),
    wire.LaneMessage("smoke", b"early"),
    ready(16, [1, 2, 3, 4], token=6),
    wire.Released("k", valid=True),
    wire.HeartbeatAck(1, ["k"]),
    wire.Cancel("k", "?"),
]


def test_nothing_but_a_challenge_is_heard_after_the_hello(s: Scripted, d: DecodeEnd) -> None:
    s.before[wire.Hello] = EVERYTHING
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    assert d.inbox.counters()["garbage_frames"] == len(EVERYTHING)
    assert d.ends("k") == [] and not d.find("k", Offered)


def test_nothing_but_a_welcome_is_heard_after_the_challenge(s: Scripted, d: DecodeEnd) -> None:
    challenge = wire.Challenge(3, bytes(32), bytes(32))
    said = [m for m in EVERYTHING if not isinstance(m, wire.Welcome)]
    s.before[wire.Proof] = [challenge, *said]
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    assert d.inbox.counters()["garbage_frames"] == len(said) + 1
    assert d.ends("k") == [] and not d.find("k", Offered)


def test_a_second_handshake_in_a_session_is_not_heard(s: Scripted, d: DecodeEnd) -> None:
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Claim)
    s.say(wire.Challenge(3, bytes(32), bytes(32)))
    s.say(WELCOME)
    until(lambda: d.inbox.counters()["garbage_frames"] == 2)
    assert d.ends("k") == []


@pytest.mark.parametrize(
    ("after", "said", "word"),
    [
        (wire.Hello, wire.Challenge(3, bytes(32), bytes(32)), "could not prove"),
        (wire.Hello, wire.Refused("x" * 60_000), "xxx ..."),
        (wire.Proof, WELCOME, "regions do not fit"),
        (wire.Proof, wire.Refused("no room"), "no room"),
    ],
)
def test_a_handshake_that_fails(s: Scripted, d: DecodeEnd, after: type, said: wire.ToReader, word: str) -> None:
    s.before[after] = [said]
    d.inbox.expect("k", s.source)
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE
    assert word in failed.message and len(failed.message) < 2000
    d.wait("k", Drained)


def test_a_handshake_that_is_not_answered(s: Scripted, d: DecodeEnd, clock: Clock) -> None:
    s.answers_handshakes = False
    d.inbox.expect("k", s.source)
    s.wait_for(wire.Hello)
    clock.now_s += HANDSHAKE_S
    d.worker.wake()
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.CONNECT and "no answer to the handshake" in failed.message


def test_a_self_test_that_does_not_end(clock: Clock, s: Scripted) -> None:
    hanging = Script(hangs=True)
    d = DecodeEnd(clock=clock, lanes=lambda memory: copy_lanes(memory, copy=hanging))
    d.inbox.expect("k", s.source)
    until(lambda: hanging.pulls)
    clock.now_s += HANDSHAKE_S
    d.worker.wake()
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.CONNECT and "has passed its test" in failed.message
    assert not d.close()  # the read may still come, so the memory cannot be given away
    hanging.hangs = False
