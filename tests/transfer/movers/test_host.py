"""Strided copies and checksums on host memory, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from pd_serve.transfer.movers import host as host_mover
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.movers.host import HostMover, HostWork


def reference_sum(words: np.ndarray) -> int:
    """The definition, word by word."""
    i = np.arange(len(words), dtype=np.uint64)
    weights = ((i * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)) | np.uint64(1)
    return int((words.astype(np.uint64) * weights).sum(dtype=np.uint64))


def finish(work: HostWork) -> HostWork:
    while not work.done():
        pass
    return work


def strided(memory: np.ndarray, count: int, num_rows: int, row_bytes: int, seed: int) -> tuple[Rows, np.ndarray]:
    """Random places that do not overlap, and the index of each byte, [count, rows, bytes]."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(memory.nbytes // row_bytes // num_rows)[:count].astype(np.int64)
    rows = rng.permutation(num_rows).astype(np.int64) * row_bytes
    starts = places * num_rows * row_bytes
    index = starts[:, None, None] + rows[None, :, None] + np.arange(row_bytes)[None, None, :]
    return Rows(memory.ctypes.data, starts, rows, row_bytes), index


@pytest.fixture(scope="module")
def mover() -> HostMover:
    return HostMover()


@pytest.mark.parametrize("row_bytes", [4, 12, 64, 500, 4096])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_copies_and_sums_are_those_of_numpy(mover: HostMover, row_bytes: int, num_rows: int) -> None:
    rng = np.random.default_rng(row_bytes)
    source = rng.integers(0, 256, 64 * num_rows * row_bytes, dtype=np.uint8)
    target = np.zeros(48 * num_rows * row_bytes + 64, dtype=np.uint8)[4:]  # on 4 bytes, not on 8
    target = target[: 48 * num_rows * row_bytes]
    take, from_index = strided(source, 40, num_rows, row_bytes, 1)
    put, to_index = strided(target, 40, num_rows, row_bytes, 2)
    expected = target.copy()
    expected[to_index] = source[from_index]
    finish(mover.copy([(take, put)]))
    assert np.array_equal(target, expected)
    sums = finish(mover.checksums(put)).result()
    assert sums.dtype == np.uint64
    assert sums.tolist() == [reference_sum(source[i].ravel().view("<u4")) for i in from_index]
    assert sums.tolist() == finish(mover.checksums(take)).result().tolist()


def test_several_items_and_none(mover: HostMover) -> None:
    source = np.arange(4096, dtype=np.uint8)
    target = np.zeros(4096, dtype=np.uint8)
    zero = np.zeros(1, np.int64)

    def at(memory: np.ndarray, offset: int, size: int) -> Rows:
        return Rows(memory.ctypes.data, zero + offset, zero, size)

    finish(mover.copy([(at(source, 0, 100), at(target, 0, 100)), (at(source, 200, 8), at(target, 300, 8))]))
    assert np.array_equal(target[:100], source[:100])
    assert np.array_equal(target[300:308], source[200:208])
    assert target.sum() == source[:100].sum() + source[200:208].sum()
    assert mover.copy([]).done()
    empty = Rows(source.ctypes.data, zero[:0], zero, 8)
    assert mover.copy([(empty, empty)]).done()
    assert finish(mover.checksums(empty)).result().tolist() == []


def test_large_work_is_done_in_turns(mover: HostMover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_mover, "STEP_BYTES", 1000)
    source = np.random.default_rng(0).integers(0, 256, (64, 400), dtype=np.uint8)
    target = np.zeros_like(source)
    starts, zero = np.arange(64, dtype=np.int64) * 400, np.zeros(1, np.int64)
    take, put = Rows(source.ctypes.data, starts, zero, 400), Rows(target.ctypes.data, starts, zero, 400)
    work = mover.copy([(take, put)])
    turns = 1
    while not work.done():
        turns += 1
    assert turns >= 10
    assert work.done()
    assert np.array_equal(source, target)
    sums = mover.checksums(take)
    assert not sums.done()
    assert finish(sums).result().tolist() == [reference_sum(row.view("<u4")) for row in source]


def test_sums_wait_for_the_copy_before_them(mover: HostMover) -> None:
    source = np.random.default_rng(0).integers(0, 256, (3, 10 << 20), dtype=np.uint8)
    target = np.zeros_like(source)
    starts, zero = np.arange(3, dtype=np.int64) * (10 << 20), np.zeros(1, np.int64)
    take, put = (Rows(each.ctypes.data, starts, zero, 10 << 20) for each in (source, target))
    sums = mover.checksums(put, after=mover.copy([(take, put)]))
    assert finish(sums).result().tolist() == [reference_sum(row.view("<u4")) for row in source]


def test_any_changed_word_and_any_swap_change_the_sum(mover: HostMover) -> None:
    words = np.random.default_rng(1).integers(0, 2**32, 257, dtype=np.uint32)
    rows = Rows(words.ctypes.data, np.zeros(1, np.int64), np.zeros(1, np.int64), words.nbytes)
    good = finish(mover.checksums(rows)).result()[0]
    for i in range(257):
        words[i] ^= 1 << (i % 32)
        assert finish(mover.checksums(rows)).result()[0] != good
        words[i] ^= 1 << (i % 32)
    for i in range(256):
        words[i], words[i + 1] = words[i + 1], words[i]
        assert finish(mover.checksums(rows)).result()[0] != good
        words[i], words[i + 1] = words[i + 1], words[i]


def test_shapes_that_differ_are_refused(mover: HostMover) -> None:
    zero = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="differ in shape"):
        mover.copy([(Rows(0, zero, zero, 8), Rows(0, zero, zero, 4))])
    with pytest.raises(ValueError, match="32-bit words"):
        mover.checksums(Rows(0, zero, zero, 6))


def test_staging_memory_is_aligned_and_lives_until_close() -> None:
    mover = HostMover()
    address = mover.allocate(100_000)
    assert address % 4096 == 0
    zero = np.zeros(1, np.int64)
    source = np.arange(1000, dtype=np.uint32)
    staged = Rows(address, zero, zero, source.nbytes)
    finish(mover.copy([(Rows(source.ctypes.data, zero, zero, source.nbytes), staged)]))
    assert finish(mover.checksums(staged)).result()[0] == reference_sum(source)
    mover.close()
    assert finish(mover.checksums(staged)).result()[0] == 0  # still mapped, but given back
