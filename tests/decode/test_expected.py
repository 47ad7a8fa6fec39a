from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.decode.expected import Expected
from pd_serve.errors import TransferError
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks, First, Ready
from tests.transfer.harness import SMALL

SOURCE = Source("P", "e", "tcp://127.0.0.1:1")


def expected() -> Expected:
    return Expected("k", SOURCE, 2)


def ready(num_tokens: int, *blocks: tuple[int, int, list[int]], token: int | None = None) -> Ready:
    items = [Blocks(g, first, np.array(ids, dtype="<i4").tobytes()) for g, first, ids in blocks]
    return Ready("k", num_tokens, items, None if token is None else First(token))


@given(
    st.integers(1, 40),
    st.lists(st.integers(0, 40), max_size=5),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.integers(0, 5),
)
def test_each_wanted_block_is_taken_once(
    end: int, cuts: list[int], first: tuple[int, int], accepted_after: int
) -> None:
    job = expected()
    tables = [np.arange(100, 100 + end, dtype=np.int32), np.arange(200, 200 + end, dtype=np.int32)]
    borders = sorted({min(c, end) for c in cuts} | {0, end})
    got: list[tuple[int, int, int]] = []

    def take() -> None:
        got.extend((m.group, r, v) for m in job.take() for r, v in zip(m.remote, m.local, strict=True))

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
    job.check_complete(SMALL)
    assert sorted(got) == [
        (g, 1 + g * 1000 + i, 100 * (g + 1) + i) for g in range(2) for i in range(min(first[g], end), end)
    ]


def test_blocks_without_a_place_are_not_wanted() -> None:
    job = expected()
    job.announce(ready(16, (0, 0, [1, 2, 3, 4]), (1, 2, [5, 6]), token=1))
    job.accept([np.array([9, 8, 7, 6], np.int32), np.array([0, 0, 3, 4], np.int32)], [1, 0])
    maps = {m.group: (m.remote.tolist(), m.local.tolist()) for m in job.take()}
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
