"""The KV manager of an engine with a host tier: the same blocks and the same tree, with a second place for a block.

See :mod:`pd_serve.kv.tiers`. What a prompt finds on the device is found as without a tier; what goes on behind it in
host memory, or in both, is a *reach*: blocks that can be brought here instead of being computed. An engine without a
tier has the plain manager, and pays nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pd_serve.kv.layout import KVLayout
from pd_serve.kv.manager import KVManager, SequenceBlocks, Tokens
from pd_serve.kv.named import Named
from pd_serve.kv.pool import BlockPool
from pd_serve.kv.prefix import PrefixNode, block_keys
from pd_serve.kv.tiers import Copy, HostTier, Place
from pd_serve.wire.link import GroupUsage


class Reach(NamedTuple):
    """Up to ``num_tokens`` of a prompt, beyond what its sequence has, both tiers together have along ``path``."""

    num_tokens: int
    path: list[PrefixNode]


class TieredKVManager(KVManager):
    """``num_slots[group]``: of the host tier, slot 0 included, which is never used."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: tuple[int, ...],
        capacity_tokens: int,
        *,
        num_slots: Sequence[int],
        eager: bool,
        prefix_caching: bool = True,
        fingerprint: str = "",
    ) -> None:
        self.tier = HostTier(num_slots, eager, self._emptied, self._put_by)
        super().__init__(layout, num_blocks, capacity_tokens, prefix_caching=prefix_caching, fingerprint=fingerprint)
        self._stored = self.far = Named()

    def _emptied(self, node: PrefixNode) -> None:
        self._tree.prune(node)

    def _put_by(self, node: PrefixNode, group: int, there: bool) -> None:
        if node.names and group == self._telling:
            (self._stored.stored if there else self._stored.evicted)(node.names)

    @property
    def pools(self) -> list[BlockPool[Place]]:
        """The device's, one a group."""
        return self._pools

    # --- what the plain manager does, with a tier

    def reset(self) -> None:
        """As ever, of the device. What the host tier has stays; no copy may be on its way."""
        tree = getattr(self, "_tree", None)
        super().reset()
        self.tier.restarted()
        if tree is None:
            return
        self._tree = tree
        for node in self._nodes():
            node.users = 0
            for group in range(len(node.blocks)):
                if node.blocks[group]:
                    node.blocks[group] = 0
                    self.tier.lost(node, group)
        for node in self._nodes():
            if not node.children:
                tree.prune(node)

    def _nodes(self) -> list[PrefixNode]:
        """All but the root, parents first."""
        found, stack = [], list(self._tree.root.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack += node.children.values()
        return found

    def _own(self, node: PrefixNode, group: int, block: int) -> None:
        super()._own(node, group, block)
        self.tier.filled(node, group)

    def _evicted(self, slot: tuple[PrefixNode, int]) -> None:
        self.tier.lost(*slot)
        super()._evicted(slot)

    def close(self, blocks: SequenceBlocks) -> None:
        self.tier.used(blocks.node)
        super().close(blocks)

    def host_usage(self) -> list[GroupUsage]:
        return self.tier.usage()

    def check(self, *, idle: bool = False) -> None:
        super().check(idle=idle)
        nodes = self._nodes()
        self.tier.check(nodes, idle=idle)
        stored = Counter(name for node in nodes if self.tier.slot(node, self._telling) for name in node.names)
        if stored != self._stored.held:
            raise ValueError("prefixes that the host tier has and those that routers are told of differ")

    # --- reaches

    def found(self, tokens: Tokens, limit: int, salt: bytes = b"") -> int:
        match = self.match(tokens, limit, salt)
        node = match.path[-1] if match.path else self._tree.find(salt)
        return 0 if node is None else self._reach(node, len(match.path), tokens, limit).num_tokens

    def reach(self, blocks: SequenceBlocks, tokens: Tokens, limit: int) -> Reach:
        """What both tiers have of at most ``limit`` tokens, behind the prefix that ``blocks`` were opened with."""
        return self._reach(blocks.node, blocks.num_committed, tokens, limit)

    def _reach(self, node: PrefixNode, start: int, tokens: Tokens, limit: int) -> Reach:
        size = self.layout.block_size
        if not self.prefix_caching or limit // size <= start:
            return Reach(start * size, [])
        path = self._tree.walk_from(node, block_keys(tokens, size, start, limit // size))
        whole = [group for group, g in enumerate(self.layout.groups) if g.window is None]
        count = next((i for i, node in enumerate(path) if not all(self._has(node, g) for g in whole)), len(path))
        while count and not self._windows_reached(path, start, count):
            count -= 1
        return Reach((start + count) * size, path[:count])

    def _has(self, node: PrefixNode, group: int) -> bool:
        return bool(node.blocks[group] or self.tier.slot(node, group))

    def _windows_reached(self, path: list[PrefixNode], start: int, count: int) -> bool:
        """As ``_window_cached``. What is before ``start`` the sequence holds."""
        for group, g in enumerate(self.layout.groups):
            if g.window is not None:
                first = self.layout.first_live_block(group, (start + count) * self.layout.block_size)
                if not all(self._has(node, group) for node in path[max(0, first - start) : count]):
                    return False
        return True

    def fetch(self, blocks: SequenceBlocks, reach: Reach) -> list[Copy]:
        """Extends ``blocks`` by the reach, and says which copies fill them. They are committed when those have ended.

        What the device has of it is shared. There must be room, as for :meth:`extend`.
        """
        start, end = blocks.num_committed, blocks.num_committed + len(reach.path)
        copies = []
        wanted = list[tuple[int, int, int]]()  # group, logical block and slot
        for group, pool in enumerate(self._pools):
            first = self.layout.first_live_block(group, reach.num_tokens)
            for i in range(max(start, first), end):
                node = reach.path[i - start]
                if block := node.blocks[group]:
                    pool.hold(block)
                    blocks.tables[group][i] = block
                else:
                    wanted.append((group, i, self.tier.hold(node, group)))
            self._forget_before(blocks, group, first)
        for group, i, slot in wanted:  # when all that is found is held
            [block] = self._pools[group].take(1)
            blocks.tables[group][i] = block
            copies.append(Copy(group, block, slot))
        blocks.num_blocks = end
        return copies
