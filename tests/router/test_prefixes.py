"""Hints of who has which prefix: the deepest owner, eviction, a bound, and names that prefixes share."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.router.prefixes import Prefixes
from pd_serve.wire.chunks import CHUNK_TOKENS, chain, pack, unpack

CHAIN = list(range(100, 164))


def tokens(*values: int) -> bytes:
    return array("i", values).tobytes()


def test_names_are_those_of_prefixes() -> None:
    short = tokens(*range(2 * CHUNK_TOKENS + 9))
    names = chain("model", short)
    assert len(names) == 2 and len(set(names)) == 2
    assert chain("model", short[: 4 * CHUNK_TOKENS]) == names[:1]
    assert chain("model", short[4 * CHUNK_TOKENS :], after=names[0]) == names[1:]
    assert chain("model", short[4 * CHUNK_TOKENS :]) != names[1:]
    assert not set(chain("another", short)) & set(names)
    assert unpack(pack(names)) == names
    with pytest.raises(ValueError, match="9 bytes"):
        unpack(bytes(9))


def test_the_deepest_owners_are_found_and_how_much_each_has() -> None:
    prefixes = Prefixes()
    for count in range(65):
        prefixes.stored(f"n{count}", CHAIN[:count])
        assert prefixes.tokens(f"n{count}", CHAIN) == count * CHUNK_TOKENS
    assert list(prefixes.owners(CHAIN)) == ["n64"]
    assert prefixes.owners([1, 2]) == () and prefixes.owners([]) == ()
    prefixes.forget("n64")
    assert list(prefixes.owners(CHAIN)) == ["n63"]


def test_what_a_node_did_not_have_after_all_is_forgotten() -> None:
    prefixes = Prefixes()
    prefixes.stored("a", CHAIN[:10])
    prefixes.found("a", CHAIN, 3 * CHUNK_TOKENS + 17)
    assert prefixes.tokens("a", CHAIN) == 4 * CHUNK_TOKENS
    prefixes.found("a", CHAIN, 0)
    assert prefixes.tokens("a", CHAIN) == 0 and len(prefixes) == 0 and prefixes.owners(CHAIN) == ()


def test_the_bound_holds_and_heads_outlive_tails() -> None:
    prefixes = Prefixes(most=100)
    for start in range(0, 6400, 64):
        for node in "ab":
            prefixes.stored(node, [*CHAIN[:8], *range(1000 + start, 1064 + start)])
    assert len(prefixes) <= 100
    assert prefixes.tokens("a", CHAIN[:8]) == 8 * CHUNK_TOKENS


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["stored", "evicted", "forget"]), st.integers(0, 9))))
def test_owners_are_holders(events: list[tuple[str, str, int]]) -> None:
    prefixes = Prefixes()
    for id, what, count in events:
        if what == "stored":
            prefixes.stored(id, CHAIN[:count])
        elif what == "evicted":
            prefixes.evicted(id, CHAIN[count:])
        else:
            prefixes.forget(id)
        for depth in range(1, 10):
            for owner in prefixes.owners(CHAIN[:depth]):
                assert prefixes.tokens(owner, CHAIN[:depth]) > 0
