"""vLLM's KV caches as regions of blocks, and the layout that two servers must share.

What lies inside of a block is vLLM's business (K beside V, heads before tokens, all layers together or each by itself)
and travels as it is: a *foreign* layout, which pairs only with its equal. All bytes between a block and the next one at
the same stride belong to the block: of a region nothing else is ever written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout, LayerGroup
from pd_serve.memory.region import Region

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share block tables. ``block_size``: tokens; ``window``: as in :class:`LayerGroup`."""

    layers: tuple[str, ...]
    block_size: int
    window: int | None


@dataclass(frozen=True)
class _View:
    """A part of a layer's cache whose blocks lie ``stride`` bytes apart. ``inside``: what tells orders apart."""

    address: int
    stride: int
    span: int  # bytes, from a block's first to its last of this view
    end: int  # of the memory that it lies in
    inside: str
    layer: int = field(compare=False)  # of its group, the first that lies there


@dataclass(frozen=True)
class Found:
    """``groups``: of each region the group of layers that it belongs to."""

    layout: KVLayout
    regions: tuple[Region, ...]
    groups: tuple[int, ...]


def find(
    caches: Mapping[str, Tensor], groups: Sequence[CacheGroup], num_blocks: int, *, order: str, dtype: str
) -> Found:
    """Where the blocks of vLLM's caches lie. ``order``: what vLLM says of it, such as its attention backend.

    Raises ConfigError for what cannot be read as blocks.
    """
    sizes = {group.block_size for group in groups}
    if len(sizes) != 1:
        raise ConfigError(
            f"groups of layers with blocks of {sorted(sizes)} tokens cannot be handed over by pd-serve yet"
        )
    regions: list[Region] = []
    layer_groups: list[LayerGroup] = []
    of: list[int] = []
    orders = hashlib.sha256()
    for number, group in enumerate(groups):
        for stride, parts in _parts(group, caches, num_blocks).items():
            low = min(part[0].address for part in parts)
            region = Region(low, stride, num_blocks, tuple(part[0].address - low for part in parts))
            regions.append(region)
            layer_groups.append(LayerGroup((len(of),), window=group.window, opaque_bytes=region.whole_bytes))
            of.append(number)
            for part in parts:
                orders.update(repr([(v.address - part[0].address, v.inside, v.layer) for v in part]).encode())
    name = f"vllm {order} {orders.hexdigest()[:16]}"
    return Found(KVLayout(sizes.pop(), dtype, tuple(layer_groups), name), tuple(regions), tuple(of))


def _parts(group: CacheGroup, caches: Mapping[str, Tensor], num_blocks: int) -> dict[int, list[list[_View]]]:
    """By stride, the parts of the group's blocks in the order of layers, which is the same on both servers; that of
    addresses need not be."""
    views: dict[_View, _View] = {}
    for layer, name in enumerate(group.layers):
        for view in _views(name, layer, caches[name], num_blocks):
            views.setdefault(view, view)
    found: dict[int, list[list[_View]]] = {}
    ordered = sorted(views, key=lambda view: (view.address, view.stride))
    for part in sorted(_regions(ordered), key=lambda part: min(view.layer for view in part)):
        start, stride = part[0].address, part[0].stride
        if start + stride * num_blocks > part[0].end:
            raise ConfigError(f"the last block of {group.layers[0]} reaches beyond its memory; report this layout")
        found.setdefault(stride, []).append(part)
    return found


def _views(name: str, layer: int, cache: Tensor, num_blocks: int) -> Iterator[_View]:
    """A cache is ``[blocks, ...]``, or ``[2, blocks, ...]`` with K apart from V. vLLM's kernels may cut a block into
    several: then there are that many more of them, side by side."""
    item, shape = cache.element_size(), tuple(cache.shape)
    strides = [stride * item for stride in cache.stride()]
    at = next((d for d in (0, 1) if d < len(shape) and shape[d] >= num_blocks and shape[d] % num_blocks == 0), None)
    if at is None or (at == 1 and shape[0] != 2) or num_blocks < 3:
        raise ConfigError(f"the KV cache of {name}, {shape}, is none of {num_blocks} blocks that pd-serve can read")
    each = shape[at] // num_blocks
    inner = [(each, strides[at]), *zip(shape[at + 1 :], strides[at + 1 :], strict=True)]
    span = sum((count - 1) * stride for count, stride in inner) + item
    storage = cache.untyped_storage()
    for outer in range(shape[0] if at else 1):
        yield _View(
            address=cache.data_ptr() + outer * (strides[0] if at else 0),
            stride=strides[at] * each,
            span=span,
            end=storage.data_ptr() + storage.nbytes(),
            inside=f"{cache.dtype} {inner}",
            layer=layer,
        )


def _regions(views: list[_View]) -> Iterator[list[_View]]:
    """Views that lie within one stride of each other are parts of the same blocks."""
    part: list[_View] = []
    for view in views:
        if part and view.stride == part[0].stride and view.address + view.span <= part[0].address + part[0].stride:
            part.append(view)
            continue
        if part:
            yield part
        if view.span > view.stride:
            raise ConfigError("blocks of the KV cache overlap; report this layout")
        part = [view]
    if part:
        yield part
