"""What one reader process is to do, and the KV layouts that this means. Pure data and arithmetic."""

from __future__ import annotations

import math

import msgspec

from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.values import render_size

LIMIT = "limit"  # the name of the job that measures the raw limit, in place of a transport's

_DTYPE, _ITEM_BYTES = "bfloat16", 2
_HEAD_DIM = 128  # of large blocks; with 8 heads, 32 layers and 16 tokens a block of 2 MiB: Llama 3.1 8B
_HEADS = 8


class Job(msgspec.Struct, frozen=True):
    """Sent to the reader as JSON, in a list of those that differ in their lanes alone. Sizes in bytes."""

    lane: str
    cuda: bool
    devices: tuple[int, int] = (0, 1)  # CUDA ordinals of source and reader
    cumem: bool = True
    size_bytes: int = 64 << 20  # of a pull
    block_sizes: tuple[int, ...] = ()  # none: the probe region only, as in a self-test
    in_flight: tuple[int, ...] = (1,)
    tp: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] = (16, 16)  # in a block of the source, and of the reader
    repeats: int = 5
    warmup: int = 2
    under_load: bool = False


class Case(msgspec.Struct, frozen=True):
    """One kind of pull. ``group``: of the layout, or the probe region behind the last."""

    group: int
    block_bytes: int  # of a piece
    scattered: bool
    in_flight: int


def layouts(job: Job) -> tuple[list[KVLayout], KVLayout]:
    """The layout of each source rank that the reader pulls from, and the reader's; a group a block size.

    A block size is that of a piece as the reader has it. Raises ConfigError where no block can have that size.
    """
    sources, readers = job.tp
    total = _total_heads(job.tp)
    reader_heads, source_heads = total // readers, total // sources
    ranks = range(max(1, math.ceil(reader_heads / source_heads)))  # those with heads of reader rank 0
    shapes = [_shape(size, reader_heads, min(job.tokens)) for size in job.block_sizes]
    return (
        [_layout(shapes, job.tokens[0], rank * source_heads, source_heads, total) for rank in ranks],
        _layout(shapes, job.tokens[1], 0, reader_heads, total),
    )


def _total_heads(tp: tuple[int, int]) -> int:
    """KV heads of the model: eight, or as many as both degrees divide."""
    if tp[0] % tp[1] and tp[1] % tp[0]:
        raise ConfigError(f"--tp {tp[0]}:{tp[1]}: one of the two must divide the other")
    return math.lcm(_HEADS, *tp)


def _shape(block_bytes: int, heads: int, tokens: int) -> tuple[int, int]:
    """``(layers, head dim)`` of blocks of this size."""
    unit = 2 * heads * tokens * _ITEM_BYTES  # a layer's bytes for each number of a head
    dim = min(_HEAD_DIM, block_bytes // unit)
    layers = block_bytes // (unit * dim) if dim else 0
    if not layers or layers * unit * dim != block_bytes or dim % 2:
        raise ConfigError(
            f"--block-sizes: {render_size(block_bytes)} is no block of {heads} heads of {tokens} tokens; give "
            f"multiples of {render_size(2 * unit)}, above {render_size(_HEAD_DIM * unit)} of that"
        )
    return layers, dim


def _layout(shapes: list[tuple[int, int]], tokens: int, first_head: int, heads: int, total: int) -> KVLayout:
    groups, layer = [], 0
    for layers, dim in shapes:
        names = tuple(range(layer, layer + layers))
        groups.append(kv_group(names, heads, dim, first_head=first_head, total_kv_heads=total))
        layer += layers
    return KVLayout(tokens, _DTYPE, tuple(groups))


def num_blocks(job: Job, layout: KVLayout) -> tuple[int, ...]:
    """Blocks a group, so that the reader's hold the bytes of a pull."""
    longest = max(job.tokens)
    pieces = [max(1, job.size_bytes // size) for size in job.block_sizes]
    # whole blocks on both sides
    whole = [-(-count * min(job.tokens) // longest) * longest for count in pieces]
    return tuple(tokens // layout.block_size for tokens in whole)


def cases(job: Job) -> list[Case]:
    """In the order in which they are measured."""
    probe = [Case(0, 0, scattered, 1) for scattered in (False, True)]
    found = [
        Case(group, size, scattered, in_flight)
        for group, size in enumerate(job.block_sizes)
        for scattered in (False, True)
        for in_flight in job.in_flight
        if in_flight <= max(1, job.size_bytes // size)
    ]
    return found if job.block_sizes else probe
