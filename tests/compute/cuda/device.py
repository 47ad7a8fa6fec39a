"""Where these tests run: on a GPU, or with TRITON_INTERPRET=1 on the CPU; nowhere if triton is not installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def skip_without_gpu() -> None:
    """To be called before a module under test is imported."""
    pytest.importorskip("triton")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device", allow_module_level=True)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm of ``expected``. NaN where anything is NaN."""
    actual, expected = actual.double(), expected.double().to(actual.device)
    return ((actual - expected).norm() / expected.norm()).item()


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}[dtype]


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit for bit on a GPU. The interpreter cuts off what does not fit into bfloat16, a GPU rounds."""
    if INTERPRETED and actual.dtype is torch.bfloat16:
        return error(actual, expected) < tolerance(torch.bfloat16)
    return torch.equal(actual, expected)
