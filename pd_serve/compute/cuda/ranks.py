"""Sums over the ranks of an engine on GPUs, inside CUDA graphs. See :class:`pd_serve.models.interface.Ranks`.

One buffer for all sums: each is read before the next is written.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pd_serve.distributed import all_reduce
from pd_serve.distributed.all_reduce import AllReduce
from pd_serve.distributed.group import Group
from pd_serve.models.interface import Experts, Linear


class CudaRanks:
    """``max_rows``, ``width``, ``dtype``: of what is summed."""

    def __init__(self, group: Group, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self.group = group
        timed = all_reduce.choose(group, max_rows, width, dtype)
        self._sum = AllReduce(group, max_rows, width, dtype, timed)

    def summed(self, linear: Linear) -> Linear:
        return _Summed(linear, self._sum)

    def summed_experts(self, experts: Experts) -> Experts:
        return _SummedExperts(experts, self._sum)

    def gathered(self, linear: Linear) -> Linear:
        return _Gathered(linear, self.group.size)

    def least(self, number: int) -> int:
        """Of all ranks' numbers the least."""
        value = torch.tensor([number], dtype=torch.int64, device=self.group.device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def first_rank_first(self) -> _Turn:
        """What rank 0 leaves on disk in it the others find there."""
        return _Turn(self.group)


class _Turn:
    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        if self._group.rank:
            self._wait()

    def __exit__(self, *_: object) -> None:
        if not self._group.rank:
            self._wait()

    def _wait(self) -> None:
        dist.all_reduce(torch.zeros(1, device=self._group.device))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._group.wait(event)


class _Summed:
    def __init__(self, linear: Linear, total: AllReduce) -> None:
        self._linear = linear
        self._sum = total

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        return _sum(self._sum, self._linear(x))


class _SummedExperts:
    def __init__(self, experts: Experts, total: AllReduce) -> None:
        self._experts = experts
        self._sum = total

    @property
    def tensors(self) -> list[Tensor]:
        return self._experts.tensors

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        return _sum(self._sum, self._experts(x, logits))


class _Gathered:
    def __init__(self, linear: Linear, ranks: int) -> None:
        self._linear = linear
        self._ranks = ranks

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        own = self._linear(x).contiguous()
        parts = own.new_empty(self._ranks, *own.shape)
        dist.all_gather_into_tensor(parts, own)
        return parts.transpose(0, 1).reshape(len(own), -1)


def _sum(total: AllReduce, part: Tensor) -> Tensor:
    total.input(len(part)).copy_(part)
    return total(len(part))
