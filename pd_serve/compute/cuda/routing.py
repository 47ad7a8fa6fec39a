"""Which experts the rows of a step go to, and the sum of what those make of them: the two ends of a mixture of experts.

Called by :mod:`pd_serve.compute.cuda.experts`. Nothing here depends on the host: a step's rows are sorted by experts on
the device, into arrays whose sizes follow from the number of rows alone, so that graphs can hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.models.interface import Routing

_TILE = 1024  # elements of a program


class Routed(NamedTuple):
    """``slot`` = row * experts of a token + which of them it is: what an expert is to compute for a row."""

    counts: Tensor  # [experts] int32: slots of each
    slots: Tensor  # [experts, T] int32: the first of each row count; their order is any
    shares: Tensor  # [slots] float32


def route(logits: Tensor, routing: Routing) -> Routed:
    """Of ``logits [T, experts]``: a softmax in float32, and of it the largest. Of equals the first."""
    rows, experts = logits.shape
    counts = torch.zeros(experts, dtype=torch.int32, device=logits.device)
    slots = counts.new_empty((experts, rows))
    shares = torch.empty(rows * routing.per_token, dtype=torch.float32, device=logits.device)
    if rows:
        _route[(rows,)](
            logits, counts, slots, shares, rows, logits.stride(0), EXPERTS=experts, PER_TOKEN=routing.per_token,
            NORMALISE=routing.normalise, ALL=triton.next_power_of_2(experts),
            CHOSEN=triton.next_power_of_2(routing.per_token), num_warps=1,
        )  # fmt: skip
    return Routed(counts, slots, shares)


def combine(made: Tensor, per_token: int, out: Tensor) -> None:
    """``out [T, hidden]``: the sums over each row's slots of ``made [T * per_token, hidden]``, in a fixed order."""
    rows, hidden = out.shape
    if rows:
        block = min(_TILE, triton.next_power_of_2(hidden))
        _combine[(rows, triton.cdiv(hidden, block))](
            made, out, hidden, out.stride(0), PER_TOKEN=per_token, BLOCK=block, num_warps=4
        )


@triton.jit(do_not_specialize=["rows"])  # one kernel for all numbers of rows, so that no step waits for a compiler
def _route(
    logits: tl.tensor, counts: tl.tensor, slots: tl.tensor, shares: tl.tensor, rows: tl.tensor, logits_row: tl.tensor,
    EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr, NORMALISE: tl.constexpr, ALL: tl.constexpr, CHOSEN: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    i, j = tl.arange(0, ALL), tl.arange(0, CHOSEN)
    logit = tl.load(logits + row.to(tl.int64) * logits_row + i, i < EXPERTS, other=0.0).to(tl.float32)
    # a row that is not finite must not lead to an expert that does not exist
    logit = tl.where((logit > -1e30) & (i < EXPERTS), logit, tl.where(i < EXPERTS, -1e30, -float("inf")))
    highest = tl.max(logit)
    total = tl.sum(tl.exp(logit - highest))
    expert = tl.zeros([CHOSEN], tl.int32)
    best = tl.full([CHOSEN], -float("inf"), tl.float32)
    for nth in tl.static_range(PER_TOKEN):
        most = tl.max(logit)
        index = tl.min(tl.where(logit == most, i, ALL))
        expert = tl.where(j == nth, index, expert)
        best = tl.where(j == nth, most, best)
        logit = tl.where(i == index, -float("inf"), logit)
    share = tl.exp(best - highest)
    if NORMALISE:
        share /= tl.sum(share)
    else:
        share /= total
    real = j < PER_TOKEN
    slot = row * PER_TOKEN + j
    tl.store(shares + slot, share, real)
    place = tl.atomic_add(counts + expert, 1, real, sem="relaxed")
    tl.store(slots + expert * rows + place, slot, real)


@triton.jit
def _combine(
    made: tl.tensor, out: tl.tensor, hidden: tl.tensor, out_row: tl.tensor,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for nth in tl.static_range(PER_TOKEN):
        total += tl.load(made + (row * PER_TOKEN + nth) * hidden + i, i < hidden, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + i, total.to(out.dtype.element_ty), i < hidden)
