"""Small arrays reach the device, and results the host, in one launch: whole, strided, of all types, too many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compute.cuda.device import DEVICE, INTERPRETED, skip_without_gpu

skip_without_gpu()

from pd_serve.compute.cuda.delivery import Delivery  # noqa: E402

pytestmark = pytest.mark.gpu


def host(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    values = torch.randint(-1000, 1000, shape).to(dtype)
    return values if INTERPRETED else values.pin_memory()


def test_arrays_of_any_shape_arrive_and_nothing_beside_them() -> None:
    sources = [host(3000), host(5, 700)[:, :33], host(2, 64, dtype=torch.int64)[:, :1], host(9, dtype=torch.float32)]
    targets = [torch.zeros(7, 4096, dtype=source.dtype, device=DEVICE) for source in sources]
    delivery = Delivery(DEVICE)
    for round_ in range(3):
        delivery.begin()
        for source, target in zip(sources, targets, strict=True):
            target.zero_()
            source += round_
            rows, width = source.shape if source.dim() == 2 else (1, len(source))
            delivery.add(target[:rows, :width] if source.dim() == 2 else target[0, :width], source)
        delivery.go()
        for source, target in zip(sources, targets, strict=True):
            expected = torch.zeros(target.shape, dtype=source.dtype)
            rows, width = source.shape if source.dim() == 2 else (1, len(source))
            expected[:rows, :width] = source
            assert torch.equal(target.cpu(), expected)


def test_results_come_back_also_those_beyond_the_table() -> None:
    delivery = Delivery(DEVICE, most=2)
    values = [torch.randn(n, 3, device=DEVICE) for n in (1, 50, 0, 7)]
    delivery.begin()
    found = [delivery.bring(value) for value in values]
    delivery.go()
    delivery.begin()  # it has arrived
    if not INTERPRETED:
        torch.cuda.synchronize()  # what an engine copied
    assert [f.tolist() for f in found] == [v.tolist() for v in values]
