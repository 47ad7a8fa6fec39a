from __future__ import annotations

import itertools

import pytest

from pd_serve.transfer import auth
from pd_serve.transfer.auth import Prover

SAID = (b"r" * 32, b"s" * 32, b"hello frame")


def test_a_proof_holds_for_what_it_was_made_for_and_for_nothing_else() -> None:
    ways = list(itertools.product((b"a", b"b", b""), Prover, (SAID[0], SAID[1]), (SAID[1], SAID[0]), (b"h", b"i")))
    macs = {way: auth.proof(*way) for way in ways}
    assert len(set(macs.values())) == len(ways)
    for way, mac in macs.items():
        assert auth.holds(mac, *way)
        assert not any(auth.holds(mac, *other) for other in ways if other != way)


def test_a_proof_vouches_for_what_comes_with_it() -> None:
    mac = auth.proof(b"a", Prover.WELCOME, *SAID, b"about")
    assert auth.holds(mac, b"a", Prover.WELCOME, *SAID, b"about")
    assert not auth.holds(mac, b"a", Prover.WELCOME, *SAID, b"about me")
    assert not auth.holds(mac, b"a", Prover.WELCOME, *SAID)


@pytest.mark.parametrize("mac", [b"", b"x", bytes(32), bytes(64)])
def test_garbage_is_no_proof(mac: bytes) -> None:
    assert not auth.holds(mac, b"", Prover.SOURCE, *SAID)


@pytest.mark.parametrize(
    ("theirs", "mine", "why"),
    [
        (b"", b"a", "it has no secret and this node has one"),
        (b"a", b"", "it has a secret and this node has none"),
        (b"a", b"b", "its secret is not this node's"),
    ],
)
def test_why_a_proof_does_not_hold(theirs: bytes, mine: bytes, why: str) -> None:
    assert auth.why_not(auth.proof(theirs, Prover.READER, *SAID), mine, Prover.READER, *SAID) == why


def test_nonces_differ() -> None:
    assert len({auth.nonce() for _ in range(100)}) == 100
    assert len(auth.nonce()) == auth.NONCE_BYTES
