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

from pd_serve.jit import exp, kernel, load, store

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
@pytest.mark.parametrize("first", ["numba", "pd_serve.jit"])
def test_a_kernel_is_compiled_once_and_kept_in_the_cache(tmp_path: Path, first: str) -> None:
    (tmp_path / "doubling.py").write_text(DOUBLING)
    code = RUN.format(first=first, folder=str(tmp_path))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environ["PD_SERVE_CACHE"] = str(tmp_path / "cache")

    def run() -> list[Any]:
        return json.loads(
            subprocess.run(
                [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
            ).stdout
        )

    for hits, misses in ((0, 1), (1, 0)):
        *counted, path, found = run()
        assert counted == [hits, misses] and found == [0, 2, 4, 6]
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
