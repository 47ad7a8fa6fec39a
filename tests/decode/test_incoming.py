from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.decode.incoming import Check, Incoming, Part
from pd_serve.errors import FailureKind, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region
from pd_serve.transfer.base import Pair
from pd_serve.transfer.slices import slicings
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks, First, Ready
from tests.transfer.harness import SMALL

SOURCE = Source("P", "e", ("tcp://127.0.0.1:1",))
BLOCKS = 1 << 20  # of each pool


def sized(block_size: int) -> KVLayout:
    return dataclasses.replace(SMALL, block_size=block_size)


def expected(source: KVLayout = SMALL, reader: KVLayout = SMALL, *, checksums: bool = False) -> Part:
    regions = [
        tuple(Region(4096, layout.block_bytes(min(g, 1)), BLOCKS) for g in range(3)) for layout in (source, reader)
    ]
    [job] = Incoming("k", SOURCE).parts
    job.claimed(Pair(slicings(source, reader), *regions), checksums, (True, True))
    return job


def ready(num_tokens: int, *blocks: tuple[int, int, list[int]], token: int | None = None) -> Ready:
    items = [Blocks(g, first, np.array(ids, dtype="<i4").tobytes()) for g, first, ids in blocks]
    return Ready("k", num_tokens, items, None if token is None else First(token))


@given(
    st.integers(1, 40),
    st.lists(st.integers(0, 40), max_size=5),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_each_wanted_block_is_taken_once(
    end: int, cuts: list[int], first: tuple[int, int], accepted_after: int
) -> None:
    job = expected()
    tables = [np.arange(100, 100 + end, dtype=np.int32), np.arange(200, 200 + end, dtype=np.int32)]
    borders = sorted({min(c, end) for c in cuts} | {0, end})
    got: list[tuple[int, int, int]] = []

    def take() -> None:
        got.extend((m.group, r, v) for m, _ in job.take() for r, v in zip(m.remote, m.local, strict=True))

    for step, (a, b) in enumerate(itertools.pairwise(borders)):
        if step == accepted_after:
            job.accept(tables, list(first))
            take()
        ids = [list(range(1 + g * 1000 + a, 1 + g * 1000 + b)) for g in range(2)]
        job.announce(ready(b * 4, (0, a, ids[0]), (1, a, ids[1]), token=5 if b == end else None))
        if job.tables:
            take()
            take()
    if not job.tables:
        job.accept(tables, list(first))
        take()
    assert job.check_complete(SMALL) == (0, 0)
    assert sorted(got) == [
        (g, 1 + g * 1000 + i, 100 * (g + 1) + i) for g in range(2) for i in range(min(first[g], end), end)
    ]


def test_blocks_without_a_place_are_not_wanted() -> None:
    job = expected()
    job.announce(ready(16, (0, 0, [1, 2, 3, 4]), (1, 2, [5, 6]), token=1))
    job.accept([np.array([9, 8, 7, 6], np.int32), np.array([0, 0, 3, 4], np.int32)], [1, 0])
    maps = {m.group: (m.remote.tolist(), m.local.tolist()) for m, _ in job.take()}
    assert maps == {0: ([2, 3, 4], [8, 7, 6]), 1: ([5, 6], [3, 4])}
    job.check_complete(SMALL)


def test_a_gap_is_found_out() -> None:
    job = expected()
    job.announce(ready(16, (0, 0, [1, 2, 3, 4]), (1, 0, [1, 2]), (1, 3, [4]), token=1))
    job.accept([np.arange(1, 5, dtype=np.int32)] * 2, [0, 0])
    job.take()
    with pytest.raises(TransferError, match="never announced 1"):
        job.check_complete(SMALL)


def test_a_table_too_short_is_found_out() -> None:
    job = expected()
    job.announce(ready(13, (0, 0, [1, 2, 3, 4]), (1, 0, [1, 2, 3, 4]), token=1))
    job.accept([np.arange(1, 4, dtype=np.int32)] * 2, [0, 0])
    job.take()
    with pytest.raises(TransferError, match="only 3 have a place"):
        job.check_complete(SMALL)


@pytest.mark.parametrize(
    "nonsense",
    [
        Ready("k", 4, [Blocks(2, 0, b"\1\0\0\0")]),
        Ready("k", 4, [Blocks(-1, 0, b"\1\0\0\0")]),
        Ready("k", 4, [Blocks(0, -1, b"\1\0\0\0")]),
        Ready("k", 4, [Blocks(0, 0, b"\1\0\0")]),
        Ready("k", 4, [Blocks(0, 0, b"\0\0\0\0")]),
        Ready("k", 4, [Blocks(0, 0, b"\xff\xff\xff\xff")]),
        Ready("k", 4, [Blocks(0, 1 << 60, b"\1\0\0\0")]),
        Ready("k", 4, [Blocks(0, 0, BLOCKS.to_bytes(4, "little"))]),  # behind the end of its pool
        Ready("k", 4, [Blocks(0, 0, b"\1\0\0\0", bytes(8))]),  # checksums nobody asked for
    ],
)
def test_nonsense_is_refused(nonsense: Ready) -> None:
    with pytest.raises(TransferError):
        expected().announce(nonsense)


def test_a_block_must_not_move() -> None:
    job = expected()
    job.announce(ready(4, (0, 0, [1])))
    job.announce(ready(8, (0, 0, [1, 2])))
    with pytest.raises(TransferError, match="twice"):
        job.announce(ready(8, (0, 1, [3])))


# --- blocks of different sizes


@given(
    st.sampled_from([(2, 4), (4, 2), (4, 16), (16, 4), (8, 8)]),
    st.integers(1, 150),
    st.lists(st.integers(1, 150), max_size=4),
    st.integers(0, 150),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_every_token_comes_from_where_it_is(
    sizes: tuple[int, int], num_tokens: int, chunks: list[int], cached_tokens: int, random: random.Random
) -> None:
    """Token by token: where a decode node keeps it is filled from where the prefill node keeps it."""
    source, reader = sized(sizes[0]), sized(sizes[1])
    job = expected(source, reader)
    theirs = [random.sample(range(1, 1000), source.blocks_for(num_tokens)) for _ in range(2)]
    ours = [np.array(random.sample(range(1, 1000), reader.blocks_for(num_tokens)), np.int32) for _ in range(2)]
    cached = min(cached_tokens, num_tokens) // reader.block_size
    first = [max(cached, reader.first_live_block(g, num_tokens)) for g in range(2)]
    live = [source.first_live_block(g, num_tokens) for g in range(2)]  # what the prefill node announces
    for g in range(2):
        ours[g][: 0 if g == 0 else first[g]] = 0
    got: list[dict[int, int]] = [{}, {}]
    tokens = min(sizes)

    def take() -> None:
        for m, _ in job.take():
            for remote, local in zip(m.remote.tolist(), m.local.tolist(), strict=True):
                for t in range(tokens):
                    assert local * tokens + t not in got[m.group]
                    got[m.group][local * tokens + t] = remote * tokens + t

    done = list(live)
    accepted = False
    for upto in [*sorted(c for c in chunks if c < num_tokens), num_tokens]:
        last = upto == num_tokens
        end = source.blocks_for(upto) if last else upto // source.block_size
        items = []
        for g in range(2):
            if end > done[g]:
                items.append((g, done[g], theirs[g][done[g] : end]))
                done[g] = end
        job.announce(ready(upto, *items, token=1 if last else None))
        if not accepted:
            job.accept(ours, first)
            accepted = True
        take()
    whole_from = job.check_complete(reader)
    for g in range(2):
        window = SMALL.groups[g].window
        for token in range(first[g] * reader.block_size, num_tokens):
            block = int(ours[g][token // reader.block_size])
            if not block:
                continue
            here = got[g].get(block * reader.block_size + token % reader.block_size)
            there = theirs[g][token // source.block_size] * source.block_size + token % source.block_size
            if here is None:  # only where no later token looks, in a block that is not offered to others
                assert window is not None and token < num_tokens - window + 1
                assert token // reader.block_size < whole_from[g]
            else:
                assert here == there
        assert whole_from[g] <= first[g] + 1
        if sizes[0] >= sizes[1]:
            assert whole_from[g] == 0  # the prefill node keeps at least as much as this one wants


def test_a_missing_piece_is_found_out() -> None:
    job = expected(sized(2), sized(4))
    job.announce(ready(7, (0, 0, [1, 2, 3, 4]), (1, 0, [1, 2, 3]), token=1))
    job.accept([np.arange(1, 3, dtype=np.int32)] * 2, [0, 0])
    job.take()
    with pytest.raises(TransferError, match="never announced 1 pieces"):
        job.check_complete(sized(4))


# --- checksums


class Sum:
    def __init__(self, result: list[int], rounds: int) -> None:
        self._result = np.array(result, np.uint64)
        self._rounds = rounds

    def done(self) -> bool:
        self._rounds -= 1
        return self._rounds < 0

    def result(self) -> np.ndarray:
        return self._result


def announced(*sums: int) -> np.ndarray:
    return np.array(sums, np.uint64)


def test_announced_sums_stay_with_their_pieces() -> None:
    job = expected(sized(8), sized(4), checksums=True)
    ids = np.array([5, 3], "<i4").tobytes()
    sums = np.array([50, 51, 30, 31], "<u8").tobytes()
    job.announce(Ready("k", 16, [Blocks(0, 0, ids, sums)], None))
    job.accept([np.array([7, 0, 9, 8], np.int32), np.zeros(4, np.int32)], [0, 0])
    [(blocks, expected_sums)] = job.take()
    assert blocks.remote.tolist() == [10, 6, 7] and blocks.local.tolist() == [7, 9, 8]
    assert expected_sums.tolist() == [50, 30, 31]


@pytest.mark.parametrize("sums", [b"", bytes(8), bytes(15), bytes(24)])
def test_checksums_that_cannot_be(sums: bytes) -> None:
    with pytest.raises(TransferError, match="checksums"):
        expected(checksums=True).announce(Ready("k", 8, [Blocks(0, 0, b"\1\0\0\0\2\0\0\0", sums)]))


def test_checks_are_open_until_all_have_ended() -> None:
    job = expected()
    job.checks = [Check(Sum([1, 2], 1), announced(1, 2)), Check(Sum([3], 0), announced(3))]
    assert job.open_checks()
    assert not job.open_checks()
    assert not job.open_checks()


def test_a_sum_that_differs_is_a_failure_of_its_own_kind() -> None:
    job = expected()
    job.checks = [Check(Sum([1, 2, 3], 0), announced(1, 7, 8))]
    with pytest.raises(TransferError, match="2 of 3 pieces") as raised:
        job.open_checks()
    assert raised.value.kind == FailureKind.CHECKSUM
