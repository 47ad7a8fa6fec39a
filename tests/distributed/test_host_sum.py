"""Sums and collections through shared memory: right, the same bits on all ranks, and an end when a rank ends."""

from __future__ import annotations

import os
import time

import pytest
import torch

from pd_serve.distributed.group import Group, RankLost
from pd_serve.distributed.host_sum import SLOT_BYTES, HostSum
from tests.distributed.ranks import run

RANKS = 3


def parts(rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of each rank: every rank knows all of them."""
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(RANKS)]


def sums_and_then_one_dies(group: Group) -> object:
    sums = HostSum(group)
    said = []
    for rows, width, dtype in (
        (0, 64, torch.float32),
        (1, 64, torch.float32),
        (5, 10, torch.bfloat16),
        (3, SLOT_BYTES // 8, torch.float32),  # in pieces
    ):
        for _ in range(3):  # turns are taken
            given = parts(rows, width, dtype)
            total = sums.sum_(given[group.rank].clone())
            expected = given[0].float() + given[1].float() + given[2].float()
            assert torch.equal(total, expected.to(dtype)), (rows, dtype)
            assert torch.equal(sums.gather(given[group.rank]), torch.cat(given, 1)), (rows, dtype)
            said.append(float(total.double().sum()))
    assert group.least(7 - group.rank) == 5
    assert group.exchange(bytes([group.rank]) * group.rank) == [b"", b"\1", b"\2\2"]
    if group.rank == 1:
        os._exit(3)
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"rank [012] of 3 has ended"):
        sums.sum_(torch.ones(2, 8))
    assert time.monotonic() - began < 10
    return said


def test_ranks_sum_and_one_that_ends_is_noticed() -> None:
    first, silent, third = run(sums_and_then_one_dies, "cpu", size=RANKS)
    assert isinstance(first, list), first
    assert first == third
    assert silent is None
