"""A decode node reduced to its socket: how tests speak to an outbox."""

from __future__ import annotations

from typing import Any

import msgspec

from pd_serve.transfer.session.handshake import Greeting
from pd_serve.wire import peer as wire
from tests.transfer.frames import Frames
from tests.transfer.harness import SMALL, Pool, PrefillEnd, identity, until

LEASE_S = 30.0  # of the outbox in conftest.py


class Client:
    """A decode node reduced to its socket."""

    def __init__(
        self, end: PrefillEnd, node_id: str = "D", lanes: dict[str, bytes] | None = None, **other: object
    ) -> None:
        self.socket = Frames.dial(end.address)
        self.identity = identity(node_id, SMALL, **other)
        self.pool = Pool(self.identity.layout, 8)
        lanes = {"copy": b"copy"} if lanes is None else lanes
        self.claims: dict[str, Any] = {}
        self.greeting = Greeting(self.identity, self.pool.memory().regions, lanes)

    def say(self, message: wire.ToSource) -> None:
        self.socket.send(wire.encoder.encode(message))

    def hear(self) -> wire.ToReader:
        assert self.socket.poll(5), "no answer"
        return wire.decode_to_reader(self.socket.receive())

    def greet(self) -> wire.ToReader:
        """A whole handshake; what ends it."""
        self.socket.send(self.greeting.hello)
        challenge = self.hear()
        if not isinstance(challenge, wire.Challenge):
            return challenge
        self.prove(challenge)
        answer = self.hear()
        if isinstance(answer, wire.Welcome):
            assert self.hear() == wire.LaneMessage("copy", b"served")  # never before the welcome
        return answer

    def challenge(self) -> wire.Challenge:
        """Says hello."""
        self.socket.send(self.greeting.hello)
        challenge = self.hear()
        assert isinstance(challenge, wire.Challenge)
        return challenge

    def prove(self, challenge: wire.Challenge) -> None:
        """Proves itself and says what it is."""
        self.say(self.greeting.prove(challenge))
        self.socket.seal(self.greeting)
        self.socket.send(self.introduction())

    def introduction(self) -> bytes:
        """With ``claims`` instead of what is true."""
        said = msgspec.to_builtins(self.greeting.introduction(), builtin_types=(bytes,))
        return msgspec.msgpack.encode({**said, **self.claims})

    def sync(self, keys: list[str] | None = None) -> list[str]:
        """All that was said before has been handled; returns the keys that hold no lease."""
        self.say(wire.Heartbeat(99, keys or []))
        answer = self.hear()
        assert isinstance(answer, wire.HeartbeatAck)
        return answer.gone

    def close(self) -> None:
        self.socket.close()


def hold(end: PrefillEnd, client: Client, key: str) -> None:
    opened = end.outbox.counters()["leases_opened"]
    end.outbox.open(key)
    until(lambda: end.outbox.counters()["leases_opened"] > opened)
    client.say(wire.Claim(key))
    assert client.sync([key]) == []
