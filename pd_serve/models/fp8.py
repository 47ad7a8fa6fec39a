"""Matrices in FP8 as checkpoints have them: their scales in one of two forms, several joined into one, or dequantised.

Called by :mod:`pd_serve.models.weights`. A scale for a whole matrix becomes one for each of its rows, so that rows of
several matrices can lie in one; blocks stay blocks. Tensors here are on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pd_serve.errors import ModelError
from pd_serve.models.quantization import BLOCK

FP8 = torch.float8_e4m3fn
MAX = 448.0  # the largest number of it
_ROWS = 1024  # that are dequantised at once


@dataclass(frozen=True)
class Quantised:
    """A matrix of a checkpoint. ``scale`` float32: ``[rows]``, or ``[rows / 128, columns / 128]``, rounded up."""

    values: Tensor  # [rows, columns], e4m3
    scale: Tensor
    input_scale: float | None = None

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Each number times its scale, in float32, rounded to ``dtype``."""
        out = torch.empty(self.values.shape, dtype=dtype)
        columns = self.values.shape[1]
        for at in range(0, len(out), _ROWS):
            part = self.values[at : at + _ROWS].float()
            if self.scale.dim() == 1:
                part *= self.scale[at : at + _ROWS, None]
            else:
                scale = self.scale[at // BLOCK : -(-(at + len(part)) // BLOCK)]
                part *= scale.repeat_interleave(BLOCK, 0)[: len(part)].repeat_interleave(BLOCK, 1)[:, :columns]
            out[at : at + _ROWS] = part
        return out


def scale_shape(rows: int, columns: int, blocks: bool) -> tuple[int, ...]:
    """Of a matrix's tensor of scales in a checkpoint; with one for all rows it is ``[]`` or ``[1]`` instead."""
    return (-(-rows // BLOCK), -(-columns // BLOCK)) if blocks else (rows, 1)


def to_scale(name: str, tensor: Tensor, rows: int, columns: int, blocks: bool) -> Tensor:
    """In the form that :class:`Quantised` has. Raises ``ModelError`` for other shapes and for what is no scale."""
    shape = tuple(tensor.shape)
    allowed = {scale_shape(rows, columns, blocks)} if blocks else {(rows, 1), (rows,), (1,), ()}
    if shape not in allowed:
        raise ModelError(f"The tensor {name} has shape {shape}, but scales of {rows} x {columns} numbers are wanted.")
    scale = tensor.float()
    if not (scale.isfinite().all() and (scale >= 0).all()):
        raise ModelError(f"The tensor {name} holds scales below 0 or no numbers: get the file again.")
    return scale.contiguous() if blocks else scale.reshape(-1).expand(rows).contiguous()


def to_number(name: str, tensor: Tensor) -> float:
    """A single scale. Raises ``ModelError``."""
    value = float(tensor.float()) if tensor.numel() == 1 else 0.0
    if not 0.0 < value < torch.inf:
        raise ModelError(f"The tensor {name} must hold one number above 0.")
    return value


def joined_scale(parts: Sequence[Quantised]) -> tuple[Tensor, float | None]:
    """Of the matrix with the rows of all, and its ``input_scale``: the largest, as the range must have room for all."""
    inputs = [part.input_scale for part in parts if part.input_scale is not None]
    return torch.cat([part.scale for part in parts]), max(inputs, default=None)
