"""The outbox over its real socket, spoken to by a bare ZeroMQ client; time passes when the test says so."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import zmq

from pd_serve.transfer.handshake import hello
from pd_serve.wire import peer as wire
from tests.transfer.harness import SMALL, Clock, PrefillEnd, identity, until

LEASE_S = 30.0


class Client:
    """A decode node reduced to its socket."""

    def __init__(self, end: PrefillEnd, node_id: str = "D", **other: object) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(end.outbox.address)
        self.identity = identity(node_id, SMALL, **other)

    def say(self, message: wire.ToPrefill) -> None:
        self.socket.send(wire.encoder.encode(message))

    def hear(self) -> wire.ToDecode:
        assert self.socket.poll(5000), "no answer"
        return wire.decode_to_decode(self.socket.recv())

    def greet(self) -> wire.ToDecode:
        self.say(hello(self.identity))
        return self.hear()

    def sync(self, keys: list[str] | None = None) -> list[str]:
        """All that was said before has been handled; returns the keys that hold no lease."""
        self.say(wire.Heartbeat(99, keys or []))
        answer = self.hear()
        assert isinstance(answer, wire.HeartbeatAck)
        return answer.gone

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def end(clock: Clock) -> Iterator[PrefillEnd]:
    made = PrefillEnd(lease_s=LEASE_S, clock=clock)
    yield made
    made.close()
    assert made.outbox.counters()["transfer_faults"] == 0


@pytest.fixture
def client(end: PrefillEnd) -> Iterator[Client]:
    made = Client(end)
    assert isinstance(made.greet(), wire.Welcome)
    yield made
    made.close()


TABLES = [[3, 4, 5], [7, 8, 9]]


def test_welcome_says_all_that_a_reader_needs(end: PrefillEnd) -> None:
    client = Client(end)
    welcome = client.greet()
    assert isinstance(welcome, wire.Welcome)
    assert (welcome.node_id, welcome.epoch) == ("P", end.identity.epoch)
    assert (welcome.protocol, welcome.transport, welcome.lease_s) == (wire.PROTOCOL_MAX, "nixl", LEASE_S)
    assert len(welcome.endpoint) > 100
    client.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "m1"}, ("models differ", "m0", "m1")),
        ({"layout": "f00"}, ("KV layouts differ", "f00", SMALL.fingerprint())),
        ({"transports": ("smoke",)}, ("no transport", "smoke", "nixl")),
        ({"protocol_min": 7, "protocol_max": 9}, ("protocol", "7..9", "1..1")),
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


def test_chunks_go_out_as_they_come_and_the_release_is_valid(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    assert client.sync(["k"]) == []
    end.publish("k", 4, [[3], [7]])
    ready = client.hear()
    assert isinstance(ready, wire.Ready) and ready.num_tokens == 4 and ready.first is None
    end.publish("k", 10, TABLES, first=1, token=42)
    last = client.hear()
    assert isinstance(last, wire.Ready) and last.first == wire.First(42)
    assert [(b.group, b.first, len(b.ids)) for b in last.blocks] == [(0, 1, 8), (1, 1, 8)]
    client.say(wire.Release("k", done=True))
    assert client.hear() == wire.Released("k", valid=True)
    assert until(lambda: end.why("k")) == "released"
    assert end.outbox.num_leases == 0


def test_claim_before_the_request(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("k"))
    assert client.sync(["k"]) == []
    end.outbox.open("k")
    end.publish("k", 10, TABLES, token=1)
    assert isinstance(client.hear(), wire.Ready)


def test_claim_after_everything(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    end.publish("k", 4, [[3], [7]])
    end.publish("k", 10, TABLES, first=1, token=1)
    client.say(wire.Claim("k"))
    assert [client.hear().num_tokens for _ in range(2)] == [4, 10]  # type: ignore[union-attr]


def test_expiry(end: PrefillEnd, client: Client, clock: Clock) -> None:
    for key in ("kept", "left"):
        end.outbox.open(key)
        client.say(wire.Claim(key))
        client.sync()
        end.publish(key, 10, TABLES, token=1)
        client.hear()
    clock.now_s += 20
    assert client.sync(["kept"]) == []
    clock.now_s += 11
    end.outbox.wake()
    assert until(lambda: end.why("left")) == "expired"
    assert client.sync(["kept", "left"]) == ["left"]
    client.say(wire.Release("left", done=True))
    assert client.hear() == wire.Released("left", valid=False)
    client.say(wire.Release("kept", done=True))
    assert client.hear() == wire.Released("kept", valid=True)
    assert until(lambda: end.why("kept")) == "released"


def test_a_lease_that_ran_out_unnoticed_is_not_valid(end: PrefillEnd, client: Client, clock: Clock) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    client.sync()
    end.publish("k", 10, TABLES, token=1)
    client.hear()
    clock.now_s += LEASE_S  # nobody wakes the outbox: the release itself does
    client.say(wire.Release("k", done=True))
    assert client.hear() == wire.Released("k", valid=False)
    assert until(lambda: end.why("k")) == "expired"


def test_nobody_claims(end: PrefillEnd, clock: Clock) -> None:
    end.outbox.open("k")
    end.publish("k", 10, TABLES, token=1)
    until(lambda: end.outbox.num_leases)
    clock.now_s += LEASE_S
    end.outbox.wake()
    assert until(lambda: end.why("k")) == "expired"


def test_declined(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    client.sync()
    client.say(wire.Release("k", done=False))
    assert until(lambda: end.why("k")) == "declined"
    end.publish("k", 10, TABLES, token=1)  # the main thread had not heard yet
    assert client.sync(["k"]) == ["k"]


def test_declined_before_admission(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("k"))
    client.say(wire.Release("k", done=False))
    client.sync()
    end.outbox.open("k")
    assert until(lambda: end.why("k")) == "declined"


def test_cancel_reaches_early_and_late_claimants(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("early"))
    client.sync()
    end.outbox.cancel("early", "refused")
    assert client.hear() == wire.Cancel("early", "refused")
    end.outbox.open("late")
    end.outbox.cancel("late", "finished")
    until(lambda: end.outbox.counters()["leases_cancelled"])
    client.say(wire.Claim("late"))
    assert client.hear() == wire.Cancel("late", "finished")
    assert end.why("late") is None


def hold(end: PrefillEnd, client: Client, key: str) -> None:
    end.outbox.open(key)
    client.say(wire.Claim(key))
    assert client.sync([key]) == []


def test_a_new_epoch_ends_the_old_ones_leases(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    again = Client(end, epoch=uuid.uuid4().hex)
    again.greet()
    assert until(lambda: end.why("k")) == "peer_lost"
    again.close()


def test_another_node_does_not(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    other = Client(end, "D2")
    other.greet()
    assert client.sync(["k"]) == []
    other.say(wire.Claim("k"))
    assert isinstance(other.hear(), wire.Cancel)
    other.close()


def test_bye_ends_leases(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    client.say(wire.Bye(client.identity.epoch))
    assert until(lambda: end.why("k")) == "peer_lost"


def test_a_lost_connection_ends_leases_at_once(end: PrefillEnd) -> None:
    client = Client(end)
    client.greet()
    hold(end, client, "k")
    client.close()
    assert until(lambda: end.why("k"), 2.0) == "peer_lost"


def test_garbage_is_dropped_and_counted(end: PrefillEnd, client: Client) -> None:
    frames = [b"", b"\xff", os.urandom(64), b"\x81\xa4type\xa4nope", b"\x81\xa4type\xa5claim", os.urandom(1 << 20)]
    for frame in frames:
        client.socket.send(frame)
    client.socket.send_multipart([b"two", b"frames"])
    assert client.sync() == []
    assert end.outbox.counters()["garbage_frames"] == len(frames) + 1
    stranger = Client(end, "X")
    stranger.say(wire.Claim("k"))  # no handshake
    stranger.say(wire.Heartbeat(1, ["k"]))
    hold(end, client, "k")
    stranger.close()


def test_close_says_goodbye(end: PrefillEnd, client: Client) -> None:
    end.close()
    assert client.hear() == wire.Bye(end.identity.epoch)
