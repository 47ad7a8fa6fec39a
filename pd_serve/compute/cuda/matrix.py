"""A linear's weight as kernels take it: plain, or in FP8 with a scale for each row or each block of 128 x 128.

Scales are the last factor of a sum over a row, or of each part of it that lies in one block: kernels that walk in steps
of at most 128 inputs, over at most 128 outputs from a multiple of their number on, meet one scale at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pd_serve.models.interface import Fp8Weight
from pd_serve.models.quantization import BLOCK

PLAIN, ROWS, BLOCKS = 0, 1, 2  # scales: none, of rows, of blocks; as kernels have it


@dataclass(frozen=True)
class Matrix:
    """``values [out, in]``, contiguous."""

    values: Tensor
    transposed: Tensor
    scale: Tensor | None = None  # float32 ``[out]``, or ``[out / 128, in / 128]``, rounded up
    scales: int = PLAIN
    input_scale: float | None = None  # see Fp8Weight

    @classmethod
    def of(cls, weight: Tensor | Fp8Weight) -> Matrix:
        """Keeps what it is given. Raises ValueError."""
        values = weight if isinstance(weight, Tensor) else weight.values
        if not values.is_contiguous():
            raise ValueError("a linear's weight must be contiguous")
        if isinstance(weight, Tensor):
            return cls(values, values.t())
        scales = BLOCKS if weight.blocks else ROWS
        return cls(values, values.t(), weight.scale.contiguous(), scales, weight.input_scale)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [self.values] if self.scale is None else [self.values, self.scale]

    @property
    def scale_row(self) -> int:
        """From one row of blocks' scales to the next."""
        return -(-self.values.shape[1] // BLOCK)


@triton.jit
def block_scale(scale: tl.tensor, scale_row: tl.tensor, column: tl.tensor, at: tl.tensor) -> tl.tensor:
    """Of the block with output ``column`` and input ``at``."""
    return tl.load(scale + (column // 128) * scale_row + at // 128)
