"""The order of bytes inside a KV block: the only place that knows it.

Block-major: all layers of a group, and in a layer all its *planes*, of one block are one contiguous range::

    region of a group:  [block][layer][plane][kv head][token in block][dim]

A plane is one kind of number that a layer remembers of each token: K, V, a latent (MLA), scales (FP8). Planes of a
group may differ in heads, dim and dtype.

Layers that remember different spans (full attention, sliding windows) form groups, each with its own
region of the pool and its own block numbers. Block 0 of every group is never given out: it stands for
"no block" in block tables (padding, blocks outside a sliding window).

A *foreign* layout is another engine's: named, sized, and its order inside a block unknown here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
REGION_ALIGNMENT = 4096  # bytes: regions start on a page


@dataclass(frozen=True)
class Plane:
    """``dim`` numbers a token for each KV head.

    With tensor parallelism a rank holds the heads ``first_head .. end_head - 1`` of ``total_heads``. A latent,
    which all ranks hold, has one head.
    """

    heads: int
    dim: int
    first_head: int = 0
    total_heads: int = 0  # of the whole model; 0: this rank holds all of them
    dtype: str = ""  # empty: the layout's

    @property
    def end_head(self) -> int:
        return self.first_head + self.heads

    @property
    def heads_of_model(self) -> int:
        return self.total_heads or self.heads


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share block tables. ``window``: a token attends to itself and ``window - 1`` before it.

    ``opaque_bytes``: of a block of a foreign layout, instead of planes.
    """

    layers: tuple[int, ...]
    planes: tuple[Plane, ...] = ()
    window: int | None = None
    opaque_bytes: int = 0


def kv_group(
    layers: tuple[int, ...],
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    first_head: int = 0,
    total_kv_heads: int = 0,
) -> LayerGroup:
    """Layers with K and V of one shape: what most models have."""
    plane = Plane(num_kv_heads, head_dim, first_head, total_kv_heads)
    return LayerGroup(layers, (plane, plane), window)


@dataclass(frozen=True)
class KVLayout:
    """Shapes and sizes of KV blocks on one rank. ``foreign``: the name of a layout that is not ours."""

    block_size: int  # tokens
    dtype: str
    groups: tuple[LayerGroup, ...]
    foreign: str = ""

    def block_shape(self, group: int) -> tuple[int, int, int, int, int]:
        """``(layers, planes, kv heads, tokens, dim)`` of one block. Raises ValueError where planes differ in shape."""
        g = self.groups[group]
        shapes = {(plane.heads, plane.dim, plane.dtype) for plane in g.planes}
        if len(shapes) != 1:
            raise ValueError(f"the planes of layer group {group} have {len(shapes)} shapes")
        return (len(g.layers), len(g.planes), g.planes[0].heads, self.block_size, g.planes[0].dim)

    def token_bytes(self, group: int) -> tuple[int, ...]:
        """For each plane: one token of one head."""
        return tuple(plane.dim * DTYPE_BYTES[plane.dtype or self.dtype] for plane in self.groups[group].planes)

    def layer_bytes(self, group: int) -> int:
        """From a layer of a block to the next."""
        sizes = zip(self.groups[group].planes, self.token_bytes(group), strict=True)
        return sum(plane.heads * size for plane, size in sizes) * self.block_size

    def plane_places(self, group: int) -> list[tuple[int, int]]:
        """For each plane: where it begins in a layer, and from a head to the next, in bytes.

        A head's tokens lie side by side and fill what is between.
        """
        places, at = [], 0
        for plane, size in zip(self.groups[group].planes, self.token_bytes(group), strict=True):
            places.append((at, size * self.block_size))
            at += plane.heads * size * self.block_size
        return places

    def block_bytes(self, group: int) -> int:
        g = self.groups[group]
        return g.opaque_bytes or len(g.layers) * self.layer_bytes(group)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` positions take in a group without a window."""
        return -(-num_tokens // self.block_size)

    def first_live_block(self, group: int, num_tokens: int) -> int:
        """First logical block that a sequence of ``num_tokens`` must keep in ``group``.

        Earlier ones are outside the window of every token to come. The window is laid before the last
        whole block, not before the last token, so that the sequence's whole blocks stay a prefix hit.
        """
        window = self.groups[group].window
        if window is None:
            return 0
        whole = num_tokens - num_tokens % self.block_size
        return max(0, whole - window + 1) // self.block_size

    def region_offsets(self, num_blocks: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Byte offset of each group's region in one allocation, and the size of that allocation."""
        offsets, at = [], 0
        for group, count in enumerate(num_blocks):
            offsets.append(at)
            size = self.block_bytes(group) * count
            at += -(-size // REGION_ALIGNMENT) * REGION_ALIGNMENT
        return tuple(offsets), at

    def describe(self) -> str:
        """One line, shown in messages."""
        parts = [
            f"layers={','.join(map(str, g.layers))};window={g.window};"
            + (f"opaque={g.opaque_bytes}" if g.opaque_bytes else "+".join(map(_plane_text, g.planes)))
            for g in self.groups
        ]
        order = self.foreign or "block-major/HND v3"
        return f"{order} block={self.block_size} dtype={self.dtype} [{' | '.join(parts)}]"

    def kin(self) -> str:
        """16 hex digits: equal for nodes that can exchange blocks, whatever their share of the heads.

        And whatever their block size, where a token takes as many bytes in all planes.
        """
        if self.foreign:
            text = self.describe()  # only with its equal
        else:
            parts = [f"{g.layers};{[_kin_text(p) for p in g.planes]};{g.window}" for g in self.groups]
            uneven = any(len(set(self.token_bytes(group))) > 1 for group in range(len(self.groups)))
            text = f"{self.dtype} {' | '.join(parts)} {self.block_size if uneven else ''}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plane_text(plane: Plane) -> str:
    return f"heads={plane.first_head}+{plane.heads}/{plane.heads_of_model},dim={plane.dim}{plane.dtype}"


def _kin_text(plane: Plane) -> str:
    return f"heads={plane.heads_of_model},dim={plane.dim}{plane.dtype}"
