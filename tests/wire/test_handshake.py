"""The beginning of a link: who proves what, what is said before, and frames that somebody touched."""

from __future__ import annotations

import msgspec
import pytest

from pd_serve.auth import Seal
from pd_serve.wire import link
from pd_serve.wire.handshake import LinkRefused, NodeHalf, RouterHalf

SECRET = b"long, and random enough"


def proved(router: bytes = SECRET, node: bytes = SECRET) -> tuple[RouterHalf, NodeHalf]:
    left, right = RouterHalf(router), NodeHalf(node)
    right.check(left.prove(right.challenge(left.greeting)))
    return left, right


@pytest.mark.parametrize("secret", [SECRET, b""])
def test_both_ends_prove_the_secret(secret: bytes) -> None:
    router, node = proved(secret, secret)
    for sender, receiver in ((router.outgoing, node.incoming), (node.outgoing, router.incoming)):
        for frame in (b"", b"one", b"one", bytes(5000)):
            sealed = sender.close(frame)
            assert len(sealed) - len(frame) == (16 if secret else 0)
            assert receiver.open(sealed) == frame


@pytest.mark.parametrize(
    ("router", "node", "why"),
    [
        (SECRET, b"another one altogether", "its secret is another one"),
        (SECRET, b"", "it has no secret and this process has one"),
        (b"", SECRET, "it has a secret and this process has none"),
    ],
)
def test_who_does_not_know_it_is_refused_by_either_end(router: bytes, node: bytes, why: str) -> None:
    left, right = RouterHalf(router), NodeHalf(node)
    challenge = right.challenge(left.greeting)
    with pytest.raises(LinkRefused, match=why):
        left.prove(challenge)
    honest = link.decode_first_from_node(challenge)
    assert isinstance(honest, link.Challenge)
    with pytest.raises(LinkRefused, match="could not prove"):
        right.check(link.encoder.encode(link.Proof(honest.mac)))  # its own proof, sent back
    with pytest.raises(LinkRefused):
        right.check(left.greeting)


def test_a_proof_is_worth_nothing_in_another_session() -> None:
    router, node = RouterHalf(SECRET), NodeHalf(SECRET)
    proof = router.prove(node.challenge(router.greeting))
    replayed = NodeHalf(SECRET)
    replayed.challenge(router.greeting)
    with pytest.raises(LinkRefused):
        replayed.check(proof)


@pytest.mark.parametrize("touch", ["change", "cut", "repeat", "drop", "reflect", "insert"])
def test_a_frame_that_somebody_touched_does_not_open(touch: str) -> None:
    router, node = proved()
    first, second = router.outgoing.close(b"first"), router.outgoing.close(b"second")
    if touch == "drop":
        assert node.incoming.open(second) is None
        return
    if touch == "reflect":
        assert router.incoming.open(first) is None
        return
    assert node.incoming.open(first) == b"first"
    touched = {"change": b"S" + second[1:], "cut": second[:10], "repeat": first, "insert": b"second"}[touch]
    assert node.incoming.open(touched) is None


def test_versions_that_differ_are_told_on_both_sides() -> None:
    router, node = RouterHalf(b""), NodeHalf(b"")
    with pytest.raises(LinkRefused, match="version 99 of the link, this node 5: update the older"):
        node.challenge(link.encoder.encode(link.Greeting(99, b"n" * 32)))
    with pytest.raises(LinkRefused, match="version 99 of the link, this router 5: update the older"):
        router.prove(link.encoder.encode(link.Challenge(99, b"n" * 32, b"")))
    before = 4  # of builds whose nodes pass over a prompt's salt
    with pytest.raises(LinkRefused, match="version 4 of the link, this node 5"):
        node.challenge(link.encoder.encode(link.Greeting(before, b"n" * 32)))
    with pytest.raises(LinkRefused, match="version 4 of the link, this router 5"):
        router.prove(link.encoder.encode(link.Challenge(before, b"n" * 32, b"")))
    old = {"type": "hello", "link_version": 1, "node_id": "n", "role": "decode", "peer_address": "tcp://n"}
    with pytest.raises(LinkRefused, match="version 1 of the link"):
        router.prove(msgspec.msgpack.encode(old))  # a node from before the handshake says so at once
    for frame in (b"", b"\xc1", link.encoder.encode(link.Abort([]))):
        with pytest.raises(LinkRefused, match="update the older"):
            node.challenge(frame)


def test_keys_differ_by_direction_and_session() -> None:
    tags = {Seal(SECRET, who, part).close(b"x") for who in (b"a", b"b") for part in (b"1", b"2")}
    assert len(tags) == 4
