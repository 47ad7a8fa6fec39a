"""Compiled kernels are kept in the cache, are found there again, and compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pd_serve.jit import element_of, exp, kernel, load, store

RUN = """
import json, sys
import {first}
sys.path.insert(0, {folder!r})
import numpy as np
from doubling import double
x = np.arange(4, dtype=np.float32)
double(np.float32(0), x.ctypes.data, len(x))
hits, misses = (sum(of.values()) for of in (double.stats.cache_hits, double.stats.cache_misses))
print(json.dumps([hits, misses, str(double.stats.cache_path), x.tolist()]))
"""

DOUBLING = """
from pd_serve.jit import kernel, load, store

@kernel
def double(element, x, size):
    for i in range(size):
        store(element, x, i, 2 * load(element, x, i))
"""


@pytest.mark.slow
def test_a_kernel_is_compiled_once_and_kept_in_the_cache(tmp_path: Path) -> None:
    """Whoever imports numba first, which then reads where its cache is; wherever the same source lies."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environ["PD_SERVE_CACHE"] = str(tmp_path / "cache")

    def begin(first: str) -> subprocess.Popen[str]:
        folder = tmp_path / first
        folder.mkdir()
        (folder / "doubling.py").write_text(DOUBLING)
        code = RUN.format(first=first, folder=str(folder))
        return subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)

    both = [json.loads(process.communicate(timeout=60)[0]) for process in [begin("numba"), begin("pd_serve.jit")]]
    assert sorted(found[:2] for found in both) == [[0, 1], [1, 0]]  # one compiled, while the other waited for it
    for *_, path, found in both:
        assert found == [0, 2, 4, 6]
        assert Path(path).is_relative_to(tmp_path / "cache" / "numba")


@kernel
def exp_of_each(element: Any, x: int, size: int) -> None:
    for i in range(size):
        store(element, x, i, exp(load(element, x, i)))


def test_exp() -> None:
    x = np.concatenate([np.linspace(-87, 88, 100_001), [0, -1e30, -np.inf]]).astype(np.float32)
    expected = np.exp(np.maximum(x, -87).astype(np.float64))
    exp_of_each(np.float32(0), x.ctypes.data, len(x))
    assert np.max(np.abs(x - expected) / np.spacing(expected.astype(np.float32))) <= 2


@kernel
def copy(source: Any, target: Any, x: int, y: int, size: int) -> None:
    for i in range(size):
        store(target, y, i, load(source, x, i))


def test_numbers_in_fp8() -> None:
    fp8, f32 = element_of(torch.float8_e4m3fn), element_of(torch.float32)
    codes = torch.arange(256).to(torch.uint8)
    found = torch.empty(256)
    copy(fp8, f32, codes.data_ptr(), found.data_ptr(), 256)
    expected = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), expected.signbit())

    torch.manual_seed(0)
    halves = (expected[:127][1:] + expected[:127][:-1]) / 2  # between neighbours: to the even one
    x = torch.cat([torch.randn(100_000), torch.randn(10_000) * 0.004, torch.randn(10_000) * 100, halves, -halves])
    x = torch.cat([x.clamp(-448, 448), torch.tensor([0.0, -0.0, 1e-30, 447.9, torch.nan])])
    stored = torch.empty(len(x), dtype=torch.uint8)
    copy(f32, fp8, x.data_ptr(), stored.data_ptr(), len(x))
    torch.testing.assert_close(stored, x.to(torch.float8_e4m3fn).view(torch.uint8), rtol=0, atol=0)
    beyond = torch.tensor([449.0, 1e30, torch.inf, -500.0])  # the largest, as GPUs do
    stored = torch.empty(4, dtype=torch.uint8)
    copy(f32, fp8, beyond.data_ptr(), stored.data_ptr(), 4)
    assert stored.tolist() == [0x7E, 0x7E, 0x7E, 0xFE]
