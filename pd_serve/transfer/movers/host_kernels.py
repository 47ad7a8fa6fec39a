"""Compiled loops over strided host memory: copy rows, sum words. Used by :mod:`pd_serve.transfer.movers.host` alone.

They hold no GIL and check nothing: addresses and sizes are their caller's. See :mod:`pd_serve.jit` for how they
are compiled and where they are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pd_serve.jit import kernel, load_int, move

_I64 = np.int64(0)
_LOW, _ONE, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(1), np.uint64(32)
_FACTOR = np.uint64(0x9E3779B1)  # 2**32 divided by the golden ratio: see mover.Mover.checksums


@intrinsic
def _two_words(typingctx: Any, address: Any, index: Any) -> Any:
    """64 bits at ``address + 8 * index``, which is a multiple of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # indexed, not computed: what LLVM cannot see to be consecutive it gathers, at a fifth of the speed
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]), align=4)

    return types.uint64(types.int64, types.int64), generate


@intrinsic
def _word(typingctx: Any, address: Any) -> Any:
    """32 bits at ``address``, as 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.zext(builder.load(pointer, align=4), ir.IntType(64))

    return types.uint64(types.int64), generate


@kernel
def copy_rows(
    source: int,
    source_starts: int,
    source_rows: int,
    target: int,
    target_starts: int,
    target_rows: int,
    num_rows: int,
    row_bytes: int,
    begin: int,
    end: int,
) -> None:
    """Copies all rows of the starts ``begin .. end``. Starts and rows are addresses of int64 arrays."""
    for n in range(begin, end):
        s = source + load_int(_I64, source_starts, n)
        t = target + load_int(_I64, target_starts, n)
        for r in range(num_rows):
            move(t + load_int(_I64, target_rows, r), s + load_int(_I64, source_rows, r), row_bytes)


@kernel
def sum_rows(base: int, starts: int, rows: int, num_rows: int, row_bytes: int, begin: int, end: int, out: Any) -> None:
    """``out[n]`` = checksum of the rows of start n, for ``begin .. end``; ``out`` is a uint64 array."""
    pairs, odd = row_bytes // 8, row_bytes % 8 != 0
    step = (_FACTOR + _FACTOR) & _LOW
    for n in range(begin, end):
        total = np.uint64(0)
        weight = np.uint64(0)  # of the row's first word, without its last bit; only the low half counts
        for r in range(num_rows):
            row = base + load_int(_I64, starts, n) + load_int(_I64, rows, r)
            a, b = weight, weight + _FACTOR
            for i in range(pairs):
                x = _two_words(row, i)
                total += (x & _LOW) * ((a & _LOW) | _ONE) + (x >> _HIGH) * ((b & _LOW) | _ONE)
                a += step
                b += step
            if odd:
                total += _word(row + 8 * pairs) * ((a & _LOW) | _ONE)
                a += _FACTOR
            weight = a & _LOW
        out[n] = total
