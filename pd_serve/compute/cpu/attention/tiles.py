"""The two inner products of decode attention on four tokens at a time, written in LLVM's vectors.

Used by :mod:`pd_serve.compute.cpu.attention.kernels`. Left to itself LLVM sums each score across its vector alone and
converts each bfloat16 for each query head again, which together take twice the time of the multiplications. LLVM
splits the vectors where a machine's are shorter.

A bfloat16 row is loaded as 32-bit words and kept as *low* and *high* halves (``x << 16``, ``x & 0xffff0000``): half
the conversions, and the order of elements is the same for queries, keys and values; ``write_tile`` restores it. Keys
and values in FP8 keep their order, and go with queries in float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pd_serve.jit import float_of_fp8

TOKENS = 4  # a tile's
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FAST = ("reassoc", "contract", "nsz")


def is_tileable(dim: int, itemsize: int) -> bool:
    """Whether heads of ``dim`` elements can be computed here: their rows are whole vectors."""
    return dim * itemsize % 16 == 0


def _lanes(element: Any, dim: int) -> int:
    """Vector length: the longest of which a row is a multiple (a bfloat16 row: of pairs of them)."""
    step = 2 if element == types.uint16 else 1
    return next(n for n in (16, 8, 4) if dim % (step * n) == 0)


def _at(builder: Any, kind: Any, address: Any, offset_bytes: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset_bytes), kind.as_pointer())


def _row(builder: Any, element: Any, address: Any, index: Any, dim: int) -> list[Any]:
    """``address[index : index + dim]`` as float32 vectors."""
    lanes = _lanes(element, dim)
    if element == types.uint8:
        numbers = ir.VectorType(_I8, lanes)
        return [
            float_of_fp8(builder, builder.load(_at(builder, numbers, address, builder.add(index, _I64(i))), align=1))
            for i in range(0, dim, lanes)
        ]
    size = 2 if element == types.uint16 else 4
    vector = ir.VectorType(_I32 if size == 2 else _F32, lanes)
    start = builder.mul(index, _I64(size))
    words = [
        builder.load(_at(builder, vector, address, builder.add(start, _I64(4 * i))), align=size)
        for i in range(0, dim * size // 4, lanes)
    ]
    if size == 4:
        return words
    kind = ir.VectorType(_F32, lanes)
    low = [builder.bitcast(builder.shl(w, vector([16] * lanes)), kind) for w in words]
    high = [builder.bitcast(builder.and_(w, vector([0xFFFF0000] * lanes)), kind) for w in words]
    return low + high


def _multiply_add(builder: Any, a: Any, b: Any, total: Any | None) -> Any:
    product = builder.fmul(a, b, flags=_FAST)
    return product if total is None else builder.fadd(product, total, flags=_FAST)


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums across four vectors, as one vector of four."""

    def fold(a: Any, b: Any) -> Any:
        # neighbours are added; inside each 128 bits first a's two sums, then b's: the shuffle that costs least
        n = a.type.count
        masks = [[base + lane + odd for lane in range(0, n, 4) for base in (0, 2, n, n + 2)] for odd in (0, 1)]
        parts = [builder.shuffle_vector(a, b, ir.VectorType(_I32, n)(mask)) for mask in masks]
        return builder.fadd(*parts, flags=_FAST)

    total = fold(fold(*vectors[:2]), fold(*vectors[2:]))
    while (n := total.type.count) > TOKENS:
        halves = [
            builder.shuffle_vector(total, total, ir.VectorType(_I32, n // 2)(list(range(first, first + n // 2))))
            for first in (0, n // 2)
        ]
        total = builder.fadd(*halves, flags=_FAST)
    return total


def _rows(builder: Any, index: Any, count: Any, dim: int) -> list[Any]:
    """Index of each token's row. Those beyond ``count`` repeat the first: what lies behind may be anything."""
    indices = [index]
    for j in range(1, TOKENS):
        there = builder.icmp_signed("<", _I64(j), count)
        indices.append(builder.select(there, builder.add(index, _I64(j * dim)), index))
    return indices


@intrinsic(prefer_literal=True)
def score_tile(
    typingctx: Any, element: Any, kept: Any, query: Any, keys: Any, index: Any, count: Any, scores: Any, stride: Any,
    group: Any, dim: Any,
) -> Any:  # fmt: skip
    """``scores[g * stride + j] = query[g] @ keys[j]`` for each g and four tokens j, ``count`` of which mean something.

    ``query [group, dim]`` starts at its address, ``keys [., dim]`` at element ``index``, of type ``kept``: ``element``,
    or FP8 where that is float32; ``scores`` are float32.
    """
    num_heads, size = group.literal_value, dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, query, keys, index, count, scores, stride, _, _ = arguments
        kind, keeps = signature.args[:2]
        rows = [_row(builder, keeps, keys, at, size) for at in _rows(builder, index, count, size)]
        for g in range(num_heads):
            q = _row(builder, kind, query, _I64(g * size), size)
            products = []
            for row in rows:
                total = None
                for a, b in zip(q, row, strict=True):
                    total = _multiply_add(builder, a, b, total)
                products.append(total)
            sums = _sums(builder, products)
            to = builder.mul(stride, _I64(4 * g))
            builder.store(sums, _at(builder, sums.type, scores, to), align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(element, kept, i64, i64, i64, i64, i64, i64, group, dim), generate


@intrinsic(prefer_literal=True)
def value_tile(
    typingctx: Any, kept: Any, weights: Any, stride: Any, values: Any, index: Any, count: Any, result: Any,
    group: Any, dim: Any,
) -> Any:  # fmt: skip
    """``result[g] += weights[g * stride + j] * values[j]``, summed over ``count`` of four tokens j, for each g.

    ``values [., dim]``, of type ``kept``, start at element ``index``; ``weights`` and ``result [group, dim]`` are
    float32.
    """
    num_heads, size = group.literal_value, dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, weights, stride, values, index, count, result, _, _ = arguments
        kind = signature.args[0]
        rows = [_row(builder, kind, values, at, size) for at in _rows(builder, index, count, size)]
        vector = rows[0][0].type
        for g in range(num_heads):
            first = builder.mul(stride, _I64(4 * g))
            totals = []
            for i in range(len(rows[0])):
                at = _at(builder, vector, result, _I64(4 * (g * size + i * vector.count)))
                totals.append((at, builder.load(at, align=4)))
            for j, row in enumerate(rows):
                weight = builder.load(_at(builder, _F32, weights, builder.add(first, _I64(4 * j))), align=4)
                weight = builder.select(builder.icmp_signed("<", _I64(j), count), weight, _F32(0.0))
                lane = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, _I32(0))
                same = builder.shuffle_vector(lane, lane, ir.VectorType(_I32, vector.count)([0] * vector.count))
                totals = [(at, _multiply_add(builder, same, v, t)) for (at, t), v in zip(totals, row, strict=True)]
            for at, total in totals:
                builder.store(total, at, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(kept, i64, i64, i64, i64, i64, i64, group, dim), generate


@intrinsic(prefer_literal=True)
def write_tile(typingctx: Any, element: Any, result: Any, out: Any, group: Any, dim: Any) -> Any:
    """``out[group, dim] = result``, rounded, in the order of elements that it has outside of tiles."""
    num_heads, size = group.literal_value, dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, result, out, _, _ = arguments
        kind = signature.args[0]
        lanes = _lanes(kind, size)
        floats, words = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)

        def read(index: int) -> Any:
            return builder.load(_at(builder, floats, result, _I64(4 * index)), align=4)

        def rounded(value: Any) -> Any:
            bits = builder.bitcast(value, words)
            odd = builder.and_(builder.lshr(bits, words([16] * lanes)), words([1] * lanes))
            return builder.add(builder.add(bits, words([0x7FFF] * lanes)), odd)

        step = 2 if kind == types.uint16 else 1
        for g in range(num_heads):
            for i in range(0, size // step, lanes):
                value = read(g * size + i)
                if step == 2:
                    high = builder.and_(rounded(read(g * size + size // 2 + i)), words([0xFFFF0000] * lanes))
                    value = builder.or_(builder.lshr(rounded(value), words([16] * lanes)), high)
                offset = 4 * (g * size // step + i)
                builder.store(value, _at(builder, value.type, out, _I64(offset)), align=4 // step)
        return context.get_dummy_value()

    return types.void(element, types.int64, types.int64, group, dim), generate
