"""The mover on a GPU against numpy: strided copies of odd and even sizes, by engines and kernels, and checksums."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from pd_serve.transfer.movers.base import Rows, Work

pytestmark = pytest.mark.gpu

POOL_BYTES = 64 << 20


@pytest.fixture(scope="module")
def mover() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from pd_serve.transfer.movers.cuda import CudaMover

    torch.zeros(1, device="cuda:0")
    mover = CudaMover(0)
    yield mover
    mover.close()


def wait(work: Work) -> None:
    deadline = time.monotonic() + 20
    while not work.done():
        assert time.monotonic() < deadline


def moved(source: np.ndarray, target: np.ndarray, a: Rows, b: Rows) -> np.ndarray:
    """What ``target`` holds after the copy; bases are offsets here."""
    out = target.copy()
    for start_a, start_b in zip(a.starts, b.starts, strict=True):
        for row_a, row_b in zip(a.rows, b.rows, strict=True):
            at_a, at_b = int(start_a + row_a), int(start_b + row_b)
            out[at_b : at_b + a.row_bytes] = source[at_a : at_a + a.row_bytes]
    return out


def checksum(data: np.ndarray, a: Rows) -> list[int]:
    sums = []
    for start in a.starts:
        words = np.concatenate([data[int(start + r) : int(start + r) + a.row_bytes] for r in a.rows]).view("<u4")
        index = np.arange(len(words), dtype=np.uint64)
        weights = ((index * 0x9E3779B1) & 0xFFFFFFFF) | 1
        sums.append(int((words.astype(np.uint64) * weights).sum(dtype=np.uint64)))
    return sums


# pieces, rows, row bytes, distance of rows, distance of pieces
SHAPES = [
    (5, 1, 4, 4, 64),
    (33, 3, 12, 20, 100),
    (40, 4, 100, 108, 1000),
    (64, 8, 512, 1024, 16384),
    (7, 2, 4096, 8192, 65536),
    (100, 16, 1024, 4096, 65536),
    (9, 1, 65552, 65552, 65552),  # its last unit is short
    (24, 1, 2 << 20, 2 << 20, 2 << 20),
    (20, 1, 1 << 20, 1 << 20, 2 << 20),
    (2000, 1, 4096, 4096, 8192),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "plain"])
def test_copies_and_checksums(mover: Any, shape: tuple[int, ...], bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not bulk:
        monkeypatch.setattr(mover, "_bulk", None)
    pieces, rows, row_bytes, row_step, piece_step = shape
    rng = np.random.default_rng(pieces)
    source = torch.from_numpy(rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)).cuda()
    target = torch.zeros(POOL_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    offsets = np.arange(rows, dtype=np.int64) * row_step
    backwards = offsets[::-1].copy()
    slots = POOL_BYTES // piece_step
    a = Rows(0, rng.permutation(slots)[:pieces] * piece_step, offsets, row_bytes)
    b = Rows(0, rng.permutation(slots)[:pieces] * piece_step, backwards, row_bytes)
    expected = moved(source.cpu().numpy(), target.cpu().numpy(), a, b)
    on_a = Rows(source.data_ptr(), a.starts, a.rows, row_bytes)
    on_b = Rows(target.data_ptr(), b.starts, b.rows, row_bytes)
    half = pieces // 2
    items = [
        (Rows(x.base, x.starts[part], x.rows, row_bytes), Rows(y.base, y.starts[part], y.rows, row_bytes))
        for part in (slice(0, half), slice(half, None))
        for x, y in [(on_a, on_b)]
    ]
    wait(mover.copy(items))
    assert np.array_equal(target.cpu().numpy(), expected)
    sums = mover.checksums(on_a)
    wait(sums)
    assert sums.result().tolist() == checksum(source.cpu().numpy(), a)
    target.zero_()
    torch.cuda.synchronize()
    arrived = mover.checksums(on_b, after=mover.copy([(on_a, on_b)]))
    wait(arrived)
    assert arrived.result().tolist() == sums.result().tolist()


def test_one_changed_word_changes_the_sum(mover: Any) -> None:
    data = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    rows = Rows(data.data_ptr(), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 4 << 20)
    before = mover.checksums(rows)
    wait(before)
    data[77_777] ^= 1
    torch.cuda.synchronize()
    after = mover.checksums(rows)
    wait(after)
    assert before.result()[0] != after.result()[0]


def test_nothing_to_copy_is_done(mover: Any) -> None:
    none = Rows(0, np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), 4096)
    wait(mover.copy([(none, none)]))
    wait(mover.checksums(none))


def test_scratch_memory_is_used_again(mover: Any) -> None:
    data = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    rows = Rows(data.data_ptr(), np.arange(100, dtype=np.int64) * 4096, np.zeros(1, dtype=np.int64), 4096)
    for _ in range(3):
        wait(mover.checksums(rows))
    held = len(mover.buffers)
    for _ in range(50):
        wait(mover.checksums(rows))
    assert len(mover.buffers) == held


def test_staging_memory_is_whole_pages(mover: Any) -> None:
    """Memory that ends within a page is read by peers at three quarters of the rate while kernels run."""
    from pd_serve.transfer.movers.cuda import PAGE_BYTES
    from pd_serve.transfer.movers.cuda_calls import check, driver

    for size in (4096, (4 << 20) + 4096, 64 << 20):
        address = mover.allocate(size)
        base, reserved = check(driver.cuMemGetAddressRange(address), "cuMemGetAddressRange")
        assert int(base) == address and address % PAGE_BYTES == 0 and reserved % PAGE_BYTES == 0 and reserved >= size


def test_a_roused_device_copies_as_before(mover: Any) -> None:
    source = torch.arange(1 << 20, dtype=torch.int64, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    zero = np.zeros(1, dtype=np.int64)
    for _ in range(3):
        time.sleep(0.01)
        mover.rouse()
        mover.rouse()
        wait(mover.copy([(Rows(source.data_ptr(), zero, zero, 8 << 20), Rows(target.data_ptr(), zero, zero, 8 << 20))]))
    assert torch.equal(source, target)
