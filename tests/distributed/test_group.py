"""Ranks that meet, sum, and notice each other's end, on the CPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from pd_serve.distributed.all_reduce import AllReduce, choose
from pd_serve.distributed.group import Group, RankLost
from tests.distributed.ranks import run


class Never:
    def query(self) -> bool:
        return False


def sums_and_then_one_dies(group: Group) -> object:
    group.check()
    assert choose(group, 64, 8, torch.float32) == ()
    all_reduce = AllReduce(group, 64, 8, torch.float32)
    for rows in (0, 1, 7, 64):
        part = all_reduce.input(rows)
        part.copy_(torch.arange(rows * 8).view(rows, 8) + group.rank)
        got = all_reduce(rows)
        assert torch.equal(got, 2.0 * torch.arange(rows * 8).view(rows, 8) + 1)
    all_reduce.close()
    if group.rank == 1:
        os._exit(3)
    began = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2 has ended"):
        group.wait(Never())
    return time.monotonic() - began


def test_ranks_sum_and_one_that_ends_is_noticed() -> None:
    waited, silent = run(sums_and_then_one_dies, "cpu")
    assert isinstance(waited, float), waited
    assert silent is None
    assert waited < 10


def test_a_rank_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"ranks \[1, 2\] of 3 did not start"):
        Group(tmp_path, 0, 3, torch.device("cpu"), timeout_s=0.1)
    (tmp_path / "rank-0").unlink()
    with pytest.raises(RankLost, match="rank 0 did not start"):
        Group(tmp_path, 1, 2, torch.device("cpu"), timeout_s=0.1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Group(tmp_path, 2, 2, torch.device("cpu"))
