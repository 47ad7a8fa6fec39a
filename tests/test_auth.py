from __future__ import annotations

import itertools
import os

import pytest

from pd_serve import auth
from pd_serve.auth import Seal

WHO = (b"link: node", b"link: router", b"peer: decode")
SAID = list(itertools.product((b"r", b"s"), (b"s", b"r"), (b"hello", b"")))


def test_a_proof_holds_for_what_it_was_made_for_and_for_nothing_else() -> None:
    ways = [(secret, who, *parts) for secret in (b"a", b"b", b"") for who in WHO for parts in SAID]
    macs = {way: auth.proof(*way) for way in ways}
    assert len(set(macs.values())) == len(ways)
    for way, mac in macs.items():
        assert auth.holds(mac, *way)
        assert not any(auth.holds(mac, *other) for other in ways if other != way)


@pytest.mark.parametrize("mac", [b"", b"x", bytes(32), bytes(64)])
def test_garbage_is_no_proof(mac: bytes) -> None:
    assert not auth.holds(mac, b"", *WHO)


@pytest.mark.parametrize(
    ("theirs", "mine", "why"),
    [
        (b"", b"a", "it has no secret and this process has one"),
        (b"a", b"", "it has a secret and this process has none"),
        (b"a", b"b", "its secret is another one"),
    ],
)
def test_why_a_proof_does_not_hold(theirs: bytes, mine: bytes, why: str) -> None:
    assert auth.why_not(auth.proof(theirs, *WHO), mine, *WHO) == why


def test_nonces_differ() -> None:
    assert len({auth.nonce() for _ in range(100)}) == 100
    assert len(auth.nonce()) == auth.NONCE_BYTES


def test_a_seal_is_of_one_secret_one_connection_and_one_direction() -> None:
    tags = [Seal(secret, who, *parts).tag(b"frame") for secret in (b"a", b"b") for who in WHO for parts in SAID]
    assert len(set(tags)) == len(tags) and {len(tag) for tag in tags} == {auth.TAG_BYTES}


def test_a_frame_opens_as_it_was_closed_and_in_its_turn() -> None:
    sender = Seal(b"a", *WHO)
    first = sender.close(b"frame")
    second = b"frame" + sender.tag(b"frame")  # the same in two steps

    def receiver() -> Seal:
        return Seal(b"a", *WHO)

    hears = receiver()
    assert hears.open(first) == hears.open(second) == b"frame"
    hears = receiver()
    assert hears.open(first) == b"frame" and hears.open(first) is None  # again
    for touched in (second, b"framf" + first[5:], first[:-1], b"", b"frame" + os.urandom(auth.TAG_BYTES)):
        assert receiver().open(touched) is None


def test_without_a_secret_frames_are_bare() -> None:
    assert Seal().close(b"frame") == Seal(b"", *WHO).open(b"frame") == b"frame"
