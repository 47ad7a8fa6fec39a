from __future__ import annotations

import itertools
import os

import pytest

from pd_serve.transfer import auth
from pd_serve.transfer.auth import Prover, Said, Seal, Speaker

R, S = b"r" * 32, b"s" * 32
SAID = Said(R, S, b"hello frame", 3)
OTHERS = [Said(*values) for values in itertools.product((R, S), (S, R), (b"h", b"i"), (3, 4))]


def test_a_proof_holds_for_what_it_was_made_for_and_for_nothing_else() -> None:
    ways = list(itertools.product((b"a", b"b", b""), Prover, OTHERS))
    macs = {way: auth.proof(*way) for way in ways}
    assert len(set(macs.values())) == len(ways)
    for way, mac in macs.items():
        assert auth.holds(mac, *way)
        assert not any(auth.holds(mac, *other) for other in ways if other != way)


@pytest.mark.parametrize("mac", [b"", b"x", bytes(32), bytes(64)])
def test_garbage_is_no_proof(mac: bytes) -> None:
    assert not auth.holds(mac, b"", Prover.SOURCE, SAID)


@pytest.mark.parametrize(
    ("theirs", "mine", "why"),
    [
        (b"", b"a", "it has no secret and this node has one"),
        (b"a", b"", "it has a secret and this node has none"),
        (b"a", b"b", "its secret is not this node's"),
    ],
)
def test_why_a_proof_does_not_hold(theirs: bytes, mine: bytes, why: str) -> None:
    assert auth.why_not(auth.proof(theirs, Prover.READER, SAID), mine, Prover.READER, SAID) == why


def test_nonces_differ() -> None:
    assert len({auth.nonce() for _ in range(100)}) == 100
    assert len(auth.nonce()) == auth.NONCE_BYTES


def test_a_seal_is_of_one_secret_one_connection_one_direction_and_one_place() -> None:
    ways = list(itertools.product((b"a", b"b"), Speaker, OTHERS))
    tags = [Seal(*way).tag(b"frame") for way in ways]
    assert len(set(tags)) == len(ways) and {len(tag) for tag in tags} == {auth.TAG_BYTES}
    sender = Seal(b"a", Speaker.READER, SAID)
    first, second = sender.tag(b"frame"), sender.tag(b"frame")
    assert first != second

    def receiver() -> Seal:
        return Seal(b"a", Speaker.READER, SAID)

    hears = receiver()
    assert hears.holds(first, b"frame") and hears.holds(second, b"frame")
    assert not receiver().holds(second, b"frame")  # out of its turn
    assert not receiver().holds(first, b"framf")
    assert not receiver().holds(first[:-1], b"frame") and not receiver().holds(b"", b"frame")
    hears = receiver()
    assert hears.holds(first, b"frame") and not hears.holds(first, b"frame")  # again
    assert not receiver().holds(os.urandom(auth.TAG_BYTES), b"frame")
