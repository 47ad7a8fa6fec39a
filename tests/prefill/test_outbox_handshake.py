"""The outbox and who speaks to it: the handshake, strangers, sessions that end, the lanes of a session."""

from __future__ import annotations

import contextlib
import os

import msgspec
import numpy as np
import pytest

from pd_serve import auth
from pd_serve.errors import HandshakeError
from pd_serve.transfer.session import door, handshake, probe
from pd_serve.transfer.session.handshake import HANDSHAKE_S
from pd_serve.wire import peer as wire
from tests.prefill.client import LEASE_S, Client, hold
from tests.transfer.harness import LARGE, SMALL, Clock, PrefillEnd, until
from tests.transfer.scripted import Script, copy_lanes


def test_welcome_says_all_that_a_reader_needs(end: PrefillEnd) -> None:
    client = Client(end)
    welcome = client.greet()
    assert isinstance(welcome, wire.Welcome)
    pair = client.greeting.accept(welcome)
    assert (welcome.node_id, welcome.epoch, welcome.layout) == ("P", end.identity.epoch, SMALL)
    assert (welcome.lanes, welcome.why_not) == ({"copy": b"copy"}, {})
    assert (welcome.lease_s, welcome.checksums) == (LEASE_S, True)
    assert pair.source == end.pool.memory().regions and pair.reader == client.pool.memory().regions
    pattern = probe.pattern(end.identity.epoch)
    assert np.array_equal(end.pool.probe.view("<u4")[: len(pattern)], pattern)
    client.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "m1"}, ("models differ", "m0", "m1")),
        ({"layout": LARGE}, ("numbers of layer groups differ", "2 at the prefill node", "1 at the decode node")),
        ({"lanes": {"smoke": b"", "fire": b""}}, ("no transport", "smoke", "fire", "copy")),
        ({"lanes": {}}, ("no transport", "can use none")),
        ({"protocol_min": 7, "protocol_max": 9}, ("protocol", "7..9", "4..4")),
    ],
)
def test_refusals_name_both_values(
    end: PrefillEnd, other: dict[str, object], words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        client = Client(end, **other)
        refused = client.greet()
        assert isinstance(refused, wire.Refused)
        assert all(word in refused.reason for word in words)
        client.say(wire.Claim("k"))  # has no session
        client.close()
    assert end.outbox.counters()["handshakes_refused"] == 3
    assert sum("refused decode node" in r.message for r in caplog.records) == 1
    assert end.outbox.counters()["handshakes"] == 0


def test_an_older_protocol_is_told(end: PrefillEnd) -> None:
    stranger = Client(end, "X")
    old = {"type": "hello", "node_id": "X", "epoch": "e", "model": "m", "protocol_min": 2, "protocol_max": 2}
    more = {"layout": {}, "regions": [], "lanes": {"nixl": os.urandom(30_000)}, "checksums": True}
    for also in ({}, {"nonce": bytes(32)}):  # protocol 1 had none
        stranger.socket.send(msgspec.msgpack.encode(old | more | also))
        refused = stranger.hear()
        assert isinstance(refused, wire.Refused) and "2..2" in refused.reason and "4..4" in refused.reason
    stranger.close()


# what a decode node of the version before says first
HELLO_3 = (
    "84a474797065a568656c6c6fac70726f746f636f6c5f6d696e03ac70726f746f636f6c5f6d617803a56e6f6e6365c4206e6e6e6e6e6e6e6e6e"
    "6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e"
)


def test_the_protocol_before_this_one_is_told(end: PrefillEnd, client: Client) -> None:
    stranger = Client(end, "X")
    stranger.socket.send(bytes.fromhex(HELLO_3))
    assert stranger.hear() == wire.Refused(
        "peer protocol versions do not overlap: the prefill node speaks 4..4, the decode node 3..3; "
        "upgrade the older one"
    )
    assert client.sync() == []
    stranger.close()


def test_a_second_hello_changes_nothing(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    client.socket.send(client.greeting.hello)
    client.say(wire.Proof(os.urandom(32)))
    assert client.sync(["k"]) == []
    assert end.outbox.counters()["garbage_frames"] == 2


def test_garbage_is_dropped_and_counted(end: PrefillEnd, client: Client) -> None:
    frames = [b"", b"\xff", os.urandom(64), b"\x81\xa4type\xa4nope", b"\x81\xa4type\xa5claim", os.urandom(1 << 20)]
    for frame in frames:
        client.socket.send(frame)
    assert client.sync() == []
    assert end.outbox.counters()["garbage_frames"] == len(frames)
    stranger = Client(end, "X")
    stranger.say(wire.Claim("k"))  # no handshake
    stranger.say(wire.Heartbeat(1, ["k"]))
    hold(end, client, "k")
    stranger.close()


def test_close_says_goodbye(end: PrefillEnd, client: Client) -> None:
    end.close()
    assert client.hear() == wire.Bye(end.identity.epoch)


# --- who may read


def test_nothing_is_said_before_the_secret_is_proved(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    end = PrefillEnd(clock=clock, lanes=copy_lanes, me={"secret": b"right"})
    for secret, what in ((b"wrong", "its secret is another one"), (b"", "it has no secret and this process has one")):
        for _ in range(3):
            client = Client(end, secret=secret)
            challenge = client.challenge()
            with pytest.raises(HandshakeError, match="--secret-file"):  # a real client would leave now
                client.greeting.prove(challenge)
            client.say(wire.Proof(auth.proof(secret, handshake.READER, *said(client, challenge))))
            refused = client.hear()
            assert isinstance(refused, wire.Refused) and "secret" in refused.reason
            assert end.identity.node_id not in refused.reason.split() and SMALL.dtype not in refused.reason
            client.say(wire.Claim("k"))  # has no session
            client.close()
        assert sum(what in r.message and "--secret-file" in r.message for r in caplog.records) == 1
    assert end.outbox.counters()["handshakes_unproved"] == 6
    assert end.outbox.counters()["handshakes"] == 0
    good = Client(end, secret=b"right")
    assert isinstance(good.greet(), wire.Welcome)
    good.close()
    end.close()
    assert not any("right" in r.getMessage() for r in caplog.records)


def said(client: Client, challenge: wire.Challenge) -> tuple[bytes, ...]:
    hello = wire.decode_to_source(client.greeting.hello)
    assert isinstance(hello, wire.Hello)
    return handshake.said(hello.nonce, challenge.nonce, client.greeting.hello, challenge.protocol)


def test_a_client_that_leaves_because_of_the_secret_is_counted(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    end = PrefillEnd(clock=clock, lanes=copy_lanes, me={"secret": b"right"})
    client = Client(end)
    client.socket.send(client.greeting.hello)
    client.hear()
    client.say(wire.Refused("no\nthanks"))
    until(lambda: end.outbox.counters()["handshakes_unproved"])
    assert any("'no\\nthanks'" in r.getMessage() for r in caplog.records)  # in no shape to fake other lines
    client.close()
    end.close()


def test_what_was_recorded_is_worth_nothing(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    first, second = Client(end, "X"), Client(end, "X")
    challenge = first.challenge()
    proof = first.greeting.prove(challenge)
    second.socket.send(first.greeting.hello)  # the same words in another connection
    again = second.hear()
    assert isinstance(again, wire.Challenge) and again.nonce != challenge.nonce
    second.say(proof)
    assert isinstance(second.hear(), wire.Refused)
    second.say(proof)  # its handshake is over
    until(lambda: end.outbox.counters()["garbage_frames"] == 1)
    first.say(proof)
    first.say(first.greeting.introduction())
    assert isinstance(first.hear(), wire.Welcome)
    assert client.sync(["k"]) == []
    for one in (first, second):
        one.close()


def test_only_a_proved_node_takes_over_a_node_id(clock: Clock) -> None:
    end = PrefillEnd(clock=clock, lanes=copy_lanes, me={"secret": b"right"})
    client = Client(end, secret=b"right")
    client.greet()
    hold(end, client, "k")
    impostor = Client(end, secret=b"guessed")  # of the same node id
    impostor.socket.send(impostor.greeting.hello)
    assert isinstance(impostor.hear(), wire.Challenge)
    impostor.say(wire.Proof(os.urandom(32)))
    assert isinstance(impostor.hear(), wire.Refused)
    assert client.sync(["k"]) == []
    again = Client(end, secret=b"right")
    assert isinstance(again.greet(), wire.Welcome)
    assert until(lambda: end.why("k")) == "peer_lost"
    for one in (client, impostor, again):
        one.close()
    end.close()


def test_a_handshake_that_is_not_finished_is_forgotten(end: PrefillEnd, client: Client, clock: Clock) -> None:
    idle = Client(end, "X")
    idle.challenge()
    clock.now_s += HANDSHAKE_S
    end.worker.wake()
    until(lambda: end.outbox.counters()["handshakes_unfinished"] == 1)
    assert idle.socket.ended()
    idle.close()
    gone = Client(end, "X")
    gone.socket.send(gone.greeting.hello)
    gone.hear()
    gone.close()
    until(lambda: end.outbox.counters()["handshakes_unfinished"] == 2)
    silent = Client(end, "X")
    client.sync()  # its connection was accepted
    clock.now_s += HANDSHAKE_S
    end.worker.wake()
    assert silent.socket.ended()
    silent.close()


def test_a_stream_of_something_else_is_ended(end: PrefillEnd, client: Client) -> None:
    stranger = Client(end, "X")
    stranger.socket.raw.sendall(b"GET / HTTP/1.1\r\nHost: prefill\r\n\r\n")
    assert stranger.socket.ended()
    assert end.outbox.counters()["garbage_frames"] == 1
    stranger.close()
    client.socket.raw.sendall(b"\xff\xff\xff\xff")
    assert client.socket.ended()


def test_handshakes_at_once_are_bounded(end: PrefillEnd, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_STRANGERS", 3)
    many: list[Client] = []
    for number in range(6):
        many.append(one := Client(end, f"X{number}"))
        one.socket.send(one.greeting.hello)
        assert isinstance(one.hear(), wire.Challenge)
    assert end.outbox.counters()["handshakes_unfinished"] == 3
    assert client.sync() == []
    late = Client(end, "late")
    assert isinstance(late.greet(), wire.Welcome)
    for one in [*many, late]:
        one.close()


@pytest.mark.parametrize("other", [{"nonce": b"short"}, {"nonce": 7}, {"x": "x" * wire.MAX_UNPROVED_BYTES}])
def test_a_hello_that_cannot_be(end: PrefillEnd, client: Client, other: dict[str, object]) -> None:
    stranger = Client(end, "X")
    fields = msgspec.msgpack.decode(stranger.greeting.hello)
    with contextlib.suppress(ConnectionError):  # one that is too long is not even heard to its end
        stranger.socket.send(msgspec.msgpack.encode({**fields, **other}))
    until(lambda: end.outbox.counters()["garbage_frames"] == 1)
    assert client.sync() == []
    stranger.close()


@pytest.mark.parametrize(
    "other",
    [
        {"node_id": ""},
        {"node_id": "x" * 600},
        {"lanes": {f"lane{i}": b"" for i in range(40)}},
        {"regions": [{"address": 4096, "block_bytes": 1, "num_blocks": 1}] * 400},
        {"layout": 7},
        {"layout": {"block_size": "16", "dtype": "float32", "groups": []}},
        {"model": "x" * (1 << 20)},
    ],
)
def test_an_introduction_that_cannot_be(end: PrefillEnd, client: Client, other: dict[str, object]) -> None:
    """Of one that knows the secret."""
    stranger = Client(end, "X")
    stranger.claims = other
    with contextlib.suppress(ConnectionError):
        stranger.prove(stranger.challenge())
    until(lambda: end.outbox.counters()["garbage_frames"] == 1)
    assert client.sync() == []
    stranger.close()


def test_an_introduction_before_the_proof_is_not_heard(end: PrefillEnd, client: Client) -> None:
    stranger = Client(end, "D")  # the client's node id
    challenge = stranger.challenge()
    proof = stranger.greeting.prove(challenge)
    stranger.say(stranger.greeting.introduction())
    until(lambda: end.outbox.counters()["garbage_frames"] == 1)
    assert client.sync() == []
    stranger.say(proof)
    stranger.say(stranger.greeting.introduction())
    assert isinstance(stranger.hear(), wire.Welcome)
    stranger.close()


def test_a_stranger_that_talks_without_end_is_cut_off(end: PrefillEnd, client: Client) -> None:
    stranger = Client(end, "X")
    with contextlib.suppress(ConnectionError):
        stranger.socket.raw.sendall(bytes(4) * 100_000)  # empty frames
    assert stranger.socket.ended()
    assert end.outbox.counters()["garbage_frames"] == door.MAX_STRANGER_FRAMES
    assert client.sync() == []
    stranger.close()


def test_a_sealed_session_and_who_breaks_into_it(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    end = PrefillEnd(clock=clock, lanes=copy_lanes, me={"secret": b"right"})
    claim = wire.encoder.encode(wire.Claim("k"))
    for number, break_in in enumerate((seal_wrongly, no_seal, repeat), start=1):
        client = Client(end, secret=b"right")
        assert isinstance(client.greet(), wire.Welcome)
        hold(end, client, f"k{number}")
        break_in(client, claim)
        assert client.socket.ended()
        assert until(lambda n=number: end.why(f"k{n}")) == "peer_lost"
        assert end.outbox.counters()["forged_frames"] == number
        client.close()
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]  # others when a test before wants them
    assert sum("decode node D" in message and "MAC" in message for message in warnings) == 3
    end.close()


def seal_wrongly(client: Client, frame: bytes) -> None:
    client.socket.raw.sendall((len(frame) + 16).to_bytes(4, "little") + frame + os.urandom(16))


def no_seal(client: Client, frame: bytes) -> None:
    client.socket.raw.sendall(len(frame).to_bytes(4, "little") + frame)


def repeat(client: Client, frame: bytes) -> None:
    sealed = client.socket.outgoing.close(frame)
    client.socket.raw.sendall(2 * (len(sealed).to_bytes(4, "little") + sealed))


@pytest.mark.parametrize(
    "other",
    [
        {"regions": []},
        {"regions": [{"address": 1 << 62, "block_bytes": -1, "num_blocks": 1 << 62}] * 3},
        {"regions": [{"address": 0, "block_bytes": 256, "num_blocks": 4}] * 3},
        {
            "layout": {
                "block_size": 0,
                "dtype": "float32",
                "groups": [{"layers": [0], "planes": [{"heads": 1, "dim": 8}]}],
            }
        },
        {
            "layout": {
                "block_size": 4,
                "dtype": "smoke",
                "groups": [{"layers": [0], "planes": [{"heads": 1, "dim": 8}]}],
            }
        },
        {"layout": {"block_size": 4, "dtype": "float32", "groups": []}},
        {
            "layout": {
                "block_size": 1 << 40,
                "dtype": "float32",
                "groups": [{"layers": [0], "planes": [{"heads": 1 << 40, "dim": 1 << 40}]}],
            }
        },
    ],
)
def test_a_reader_that_makes_no_sense_is_refused(end: PrefillEnd, client: Client, other: dict[str, object]) -> None:
    """It knows the secret; its words may still be anything."""
    stranger = Client(end, "X")
    stranger.claims = other
    refused = stranger.greet()
    assert isinstance(refused, wire.Refused) and "decode node" in refused.reason
    assert client.sync() == []
    stranger.close()


# --- lanes


def test_lanes_hear_their_messages_and_the_choice_closes_the_others(clock: Clock) -> None:
    a, b, c = Script(), Script(), Script(cannot_serve="no room")
    end = PrefillEnd(clock=clock, lanes=lambda memory: copy_lanes(memory, a=a, b=b, c=c))
    client = Client(end, lanes={"b": b"b", "a": b"a", "c": b"c", "d": b"d"})
    client.prove(client.challenge())
    welcome = client.hear()
    assert isinstance(welcome, wire.Welcome)
    client.greeting.accept(welcome)
    assert welcome.lanes == {"a": b"a", "b": b"b"}
    assert welcome.why_not == {
        "c": "the prefill node cannot serve it: no room",
        "d": "the prefill node does not use it",
    }
    assert [client.hear() for _ in range(2)] == [wire.LaneMessage("b", b"served"), wire.LaneMessage("a", b"served")]
    client.say(wire.LaneMessage("a", b"hi"))
    client.say(wire.LaneMessage("d", b"unknown"))
    assert client.hear() == wire.LaneMessage("a", b"you said hi")
    assert (a.open_readers, b.open_readers) == (1, 1)
    client.say(wire.Chosen("c", 1e9, {}))  # never offered
    client.say(wire.Chosen("a", 1e9, {"b": "slower"}))
    client.say(wire.Chosen("b", 1e9, {}))  # once is enough
    client.say(wire.LaneMessage("b", b"was on its way"))
    assert client.sync() == []
    assert (a.open_readers, b.open_readers) == (1, 0)
    assert end.outbox.counters()["garbage_frames"] == 2
    hold(end, client, "k")
    a.rejects_messages = True  # the lane in use fails: the decode node must know
    client.say(wire.LaneMessage("a", b"nonsense"))
    assert isinstance(client.hear(), wire.Bye)
    assert until(lambda: end.why("k")) == "peer_lost"
    assert a.open_readers == 0
    client.close()
    end.close()
