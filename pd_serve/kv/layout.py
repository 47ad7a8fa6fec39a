"""The order of bytes inside a KV block: the only place that knows it.

Block-major: all layers of a group, K and V, of one block are one contiguous range (HND in a layer)::

    region of a group:  [block][layer][K|V][kv head][token in block][head dim]

Layers that remember different spans (full attention, sliding windows) form groups, each with its own
region of the pool and its own block numbers. Block 0 of every group is never given out: it stands for
"no block" in block tables (padding, blocks outside a sliding window).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REGION_ALIGNMENT = 4096  # bytes: regions start on a page


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share block tables. ``window``: a token attends to itself and ``window - 1`` before it.

    With tensor parallelism a rank holds the heads ``first_head .. first_head + num_kv_heads`` of ``heads_of_model``.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    first_head: int = 0
    total_kv_heads: int = 0  # of the whole model; 0: this rank holds all of them

    @property
    def heads_of_model(self) -> int:
        return self.total_kv_heads or self.num_kv_heads


@dataclass(frozen=True)
class KVLayout:
    """Shapes and sizes of KV blocks on one rank."""

    block_size: int  # tokens
    dtype: str
    groups: tuple[LayerGroup, ...]

    def block_shape(self, group: int) -> tuple[int, int, int, int, int]:
        """``(layers, 2, kv heads, tokens, head dim)`` of one block."""
        g = self.groups[group]
        return (len(g.layers), 2, g.num_kv_heads, self.block_size, g.head_dim)

    def block_bytes(self, group: int) -> int:
        size = DTYPE_BYTES[self.dtype]
        for n in self.block_shape(group):
            size *= n
        return size

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
        """One line: the fingerprint's preimage, shown in messages."""
        parts = [
            f"layers={','.join(map(str, g.layers))};heads={g.first_head}+{g.num_kv_heads}/{g.heads_of_model};"
            f"dim={g.head_dim};window={g.window}"
            for g in self.groups
        ]
        return f"block-major/HND v2 block={self.block_size} dtype={self.dtype} [{' | '.join(parts)}]"

    def kin(self) -> str:
        """16 hex digits: equal for nodes that can exchange blocks, whatever their block size and share of the heads."""
        parts = [f"{g.layers};{g.heads_of_model};{g.head_dim};{g.window}" for g in self.groups]
        return hashlib.sha256(f"{self.dtype} {' | '.join(parts)}".encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over :meth:`describe`."""
        return hashlib.sha256(self.describe().encode()).hexdigest()[:16]
