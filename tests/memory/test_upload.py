"""Host tensors come to a GPU whole, whatever their strides, dtypes and sizes; and files by several threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pd_serve.memory.upload import PIECE_BYTES, Upload, fill

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_copies_contiguous_and_strided_tensors(dtype: torch.dtype) -> None:
    whole = values(37, 50, dtype=dtype)
    for source in (whole, whole[3:9, 5:], whole.as_strided((20, 30), (7, 1), 11), whole[0]):
        target = torch.zeros(source.shape, dtype=dtype)
        fill(target, source)
        assert torch.equal(target, source)


def test_fill_converts() -> None:
    source = torch.randn(64, 64)
    target = torch.zeros(64, 64, dtype=torch.bfloat16)
    fill(target, source)
    assert torch.equal(target, source.bfloat16())


def test_fill_reads_mapped_files(tmp_path: Path) -> None:
    expected = values(3_000_001, dtype=torch.uint8)  # no whole number of pages
    path = tmp_path / "file"
    path.write_bytes(expected.numpy().tobytes())
    mapped = torch.from_file(str(path), size=len(expected), dtype=torch.uint8)
    for source in (mapped, mapped[4097:], mapped[:5]):
        target = torch.zeros_like(source)
        fill(target, source)
        assert torch.equal(target, expected[len(expected) - len(source) :] if len(source) > 5 else expected[:5])


@pytest.fixture
def upload() -> Iterator[Upload]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with Upload(torch.device("cuda", 0), pin=True) as made:
        yield made


@pytest.mark.gpu
def test_every_shape_arrives(upload: Upload) -> None:
    big = values(3 * PIECE_BYTES // 2 + 12_345)
    sources = [
        big, values(1), values(0), values(999, 1001)[:, 100:900], values(7).as_strided((5, 3), (1, 1)),
        values(2, PIECE_BYTES + 8), values(3, 5, 7, 11), values(40, 70, dtype=torch.float32),
    ]  # fmt: skip
    told: list[tuple[int, int]] = []
    with torch.inference_mode():
        targets = [torch.empty(source.shape, dtype=torch.bfloat16, device="cuda:0") for source in sources]
        for target, source in zip(targets, sources, strict=True):
            upload.copy(target, source)
        upload.finish(lambda done, total: told.append((done, total)))
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.bfloat16())
    whole = sum(target.numel() * 2 for target in targets)
    assert told[-1] == (whole, whole) and [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.gpu
def test_it_goes_on_after_a_finish_and_says_what_went_wrong(upload: Upload) -> None:
    target = torch.zeros(10, 10, device="cuda:0")
    upload.copy(target, torch.ones(10, 9))
    with pytest.raises(Exception, match=r"shape|broadcast"):
        upload.finish()
    upload.copy(target, torch.ones(10, 10))
    upload.finish()
    assert bool((target == 1).all())


@pytest.mark.gpu
def test_what_was_queued_before_does_not_overwrite_it(upload: Upload) -> None:
    """The memory of a target may have been another tensor's, with kernels that still write to it."""
    torch.cuda.synchronize()
    target = torch.empty(1 << 20, device="cuda:0")
    torch.cuda._sleep(200_000_000)
    target.fill_(1.0)
    upload.copy(target, torch.full((1 << 20,), 2.0))
    upload.finish()
    assert bool((target == 2).all())
