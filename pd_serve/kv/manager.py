"""Which sequence holds which blocks: allocation, prefix hits, sliding windows.

Used by the scheduler only, on the engine's main thread. All groups of a sequence have the same logical
blocks; a group with a window gives back those that no later token can see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd_serve.errors import PoolExhausted
from pd_serve.kv.layout import KVLayout
from pd_serve.kv.named import Named
from pd_serve.kv.pool import BlockPool
from pd_serve.kv.prefix import PrefixNode, PrefixTree, block_keys
from pd_serve.wire.chunks import CHUNK_TOKENS, chain, start
from pd_serve.wire.link import GroupUsage

Tokens = npt.NDArray[np.int32]
Slot = tuple[PrefixNode, int]  # a node and the group whose block it lost or holds


class SequenceBlocks:
    """A sequence's block tables. ``tables[group][i]`` is the pool block of logical block ``i``, 0 = none."""

    __slots__ = ("first", "name", "node", "num_blocks", "num_committed", "tables")

    def __init__(self, num_groups: int, capacity: int, root: PrefixNode) -> None:
        self.tables = [np.zeros(capacity, dtype=np.int32) for _ in range(num_groups)]
        self.num_blocks = 0  # logical blocks, from 0
        self.first = [0] * num_groups  # first logical block still held, a group
        self.node = root  # prefix node of the last committed block
        self.num_committed = 0
        self.name = 0  # of the last prefix that ends within the committed blocks


@dataclass(frozen=True)
class PrefixMatch:
    """``num_tokens`` of a prompt (whole blocks) are in the cache, along ``path`` from the root of its ``salt``."""

    num_tokens: int
    path: tuple[PrefixNode, ...]
    salt: bytes = b""


class KVManager:
    """``num_blocks[group]`` counts the null block. ``capacity_tokens``: the longest sequence there can be.
    ``fingerprint``: of the model, which the names of cached prefixes are made with."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: tuple[int, ...],
        capacity_tokens: int,
        *,
        prefix_caching: bool = True,
        fingerprint: str = "",
    ) -> None:
        self.layout = layout
        self.prefix_caching = prefix_caching
        self._capacity = layout.blocks_for(capacity_tokens)
        self._num_blocks = num_blocks
        self._fingerprint = fingerprint
        self.named = Named()
        self.far: Named | None = None  # of a host tier, where there is one
        # The group whose blocks say whether a prefix is there: one that remembers all of it, where there is one.
        self._telling = next((at for at, group in enumerate(layout.groups) if group.window is None), 0)
        self.reset()

    def reset(self) -> None:
        """Forgets everything: all blocks are free, no prefix is known. Whoever held blocks must be gone for good."""
        self.named.clear()
        self._tree = PrefixTree(len(self.layout.groups))
        self._pools: list[BlockPool[Slot]] = [BlockPool(n, self._evicted) for n in self._num_blocks]

    def _evicted(self, slot: Slot) -> None:
        node, group = slot
        node.blocks[group] = 0
        if node.names and group == self._telling:
            self.named.evicted(node.names)
        self._tree.prune(node)

    def match(self, tokens: Tokens, limit: int, salt: bytes = b"") -> PrefixMatch:
        """The longest cached prefix of at most ``limit`` tokens, of those with that salt. Holds nothing yet."""
        size = self.layout.block_size
        if not self.prefix_caching or limit < size:
            return PrefixMatch(0, (), salt)
        path = self._tree.walk(block_keys(tokens, size, 0, limit // size), salt)
        count = len(path)
        for group, g in enumerate(self.layout.groups):
            if g.window is None:
                count = next((i for i, n in enumerate(path[:count]) if not n.blocks[group]), count)
        while count and not self._window_cached(path, count):
            count -= 1
        return PrefixMatch(count * size, tuple(path[:count]), salt)

    def found(self, tokens: Tokens, limit: int, salt: bytes = b"") -> int:
        """How many of at most ``limit`` tokens need not be computed."""
        return self.match(tokens, limit, salt).num_tokens

    def _window_cached(self, path: list[PrefixNode], count: int) -> bool:
        """Whether every windowed group holds what a token after ``count`` blocks attends to."""
        for group, g in enumerate(self.layout.groups):
            if g.window is not None:
                first = self.layout.first_live_block(group, count * self.layout.block_size)
                if not all(node.blocks[group] for node in path[first:count]):
                    return False
        return True

    def open(self, match: PrefixMatch) -> SequenceBlocks:
        """Tables that hold the matched blocks, and nothing else yet."""
        blocks = SequenceBlocks(len(self._pools), self._capacity, self._tree.start(match.salt))
        blocks.name = start(match.salt)
        count = len(match.path)
        if count:
            for group, pool in enumerate(self._pools):
                first = self.layout.first_live_block(group, match.num_tokens)
                blocks.first[group] = first
                for i in range(first, count):
                    block = match.path[i].blocks[group]
                    pool.hold(block)
                    blocks.tables[group][i] = block
            blocks.num_blocks = blocks.num_committed = count
            blocks.node = match.path[-1]
            blocks.name = next((node.names[-1] for node in reversed(match.path) if node.names), blocks.name)
        blocks.node.users += 1
        return blocks

    def can_extend(self, blocks: SequenceBlocks, num_tokens: int, reserve: int = 0, *, live_only: bool = False) -> bool:
        """Whether :meth:`extend` would succeed and leave ``reserve`` blocks available in every group."""
        target = self.layout.blocks_for(num_tokens)
        return all(
            target - self._start(blocks, group, num_tokens, live_only) + reserve <= pool.available
            for group, pool in enumerate(self._pools)
        )

    def extend(self, blocks: SequenceBlocks, num_tokens: int, *, live_only: bool = False) -> None:
        """Gives the tables room for ``num_tokens`` positions.

        ``live_only``: windowed groups get only the blocks that the token after those positions still
        attends to (what a pull needs); otherwise all (what computing the positions needs).
        Raises PoolExhausted, and takes nothing.
        """
        target = self.layout.blocks_for(num_tokens)
        if target > self._capacity:
            raise ValueError(f"{num_tokens} tokens are more than a sequence can have here")
        if not self.can_extend(blocks, num_tokens, live_only=live_only):
            raise PoolExhausted("not enough KV blocks")
        for group, pool in enumerate(self._pools):
            start = self._start(blocks, group, num_tokens, live_only)
            if start < target:
                blocks.tables[group][start:target] = pool.take(target - start)
            if live_only:
                self._forget_before(blocks, group, self.layout.first_live_block(group, num_tokens))
        blocks.num_blocks = max(blocks.num_blocks, target)

    def _start(self, blocks: SequenceBlocks, group: int, num_tokens: int, live_only: bool) -> int:
        """First logical block that extending to ``num_tokens`` has to take in ``group``."""
        start = blocks.num_blocks
        if live_only:
            start = max(start, self.layout.first_live_block(group, num_tokens))
        return start

    def commit(self, blocks: SequenceBlocks, tokens: Tokens, num_computed: int, whole_from: Sequence[int] = ()) -> None:
        """Offers the blocks that ``num_computed`` tokens have filled to later prompts, and leaves the window.

        ``whole_from``, one a group: earlier blocks are not offered, because parts of them may be missing.
        """
        size = self.layout.block_size
        full = num_computed // size
        if self.prefix_caching and full > blocks.num_committed:
            node = blocks.node
            node.users -= 1
            for i, key in enumerate(block_keys(tokens, size, blocks.num_committed, full), blocks.num_committed):
                node = self._tree.child(node, key)
                self._name(node, blocks, tokens, i)
                for group, pool in enumerate(self._pools):
                    block = int(blocks.tables[group][i])
                    if whole_from and i < whole_from[group]:
                        continue
                    if block and not node.blocks[group] and pool.owner(block) is None:
                        self._own(node, group, block)
            node.users += 1
            blocks.node, blocks.num_committed = node, full
        for group, g in enumerate(self.layout.groups):
            if g.window is not None:
                self._forget_before(blocks, group, self.layout.first_live_block(group, num_computed))

    def _own(self, node: PrefixNode, group: int, block: int) -> None:
        node.blocks[group] = block
        self._pools[group].own(block, (node, group))
        if node.names and group == self._telling:
            self.named.stored(node.names)

    def _name(self, node: PrefixNode, blocks: SequenceBlocks, tokens: Tokens, block: int) -> None:
        """Names the prefixes that end in the block, and goes on from the last one."""
        size = self.layout.block_size
        first, last = block * size // CHUNK_TOKENS, (block + 1) * size // CHUNK_TOKENS
        if first == last:
            return
        if not node.names:
            chunks = tokens[first * CHUNK_TOKENS : last * CHUNK_TOKENS]
            node.names = tuple(chain(self._fingerprint, chunks.astype("<i4", copy=False).tobytes(), blocks.name))
        blocks.name = node.names[-1]

    def _forget_before(self, blocks: SequenceBlocks, group: int, first: int) -> None:
        old = blocks.first[group]
        if first > old:
            table = blocks.tables[group]
            self._pools[group].release(int(b) for b in table[old:first] if b)
            table[old:first] = 0
            blocks.first[group] = first

    def close(self, blocks: SequenceBlocks) -> None:
        """Gives everything back, the end of the sequence first, so that prefixes outlive their tails."""
        for group, pool in enumerate(self._pools):
            table = blocks.tables[group]
            held = table[blocks.first[group] : blocks.num_blocks][::-1]
            pool.release(int(b) for b in held if b)
            table[:] = 0
        blocks.num_blocks = blocks.num_committed = 0
        blocks.node.users -= 1
        self._tree.prune(blocks.node)

    def forget(self, held: Iterable[SequenceBlocks]) -> None:
        """Gives up all cached content: no later prompt finds anything that was computed before.

        ``held``: of all sequences there are; what they hold stays theirs, and is offered to nobody any more.
        """
        for pool in self._pools:
            pool.forget()
        for blocks in held:
            blocks.num_committed = self._capacity + 1

    def usage(self) -> list[GroupUsage]:
        return [pool.usage() for pool in self._pools]

    def host_usage(self) -> list[GroupUsage]:
        """Of a host tier; empty: there is none."""
        return []

    def check(self, *, idle: bool = False) -> None:
        """Raises ValueError where the books do not balance; ``idle``: also where a block is still held."""
        for group, pool in enumerate(self._pools):
            pool.check()
            if idle and pool.usage().used:
                raise ValueError(f"{pool.usage().used} KV blocks of group {group} are held although nothing runs")
        self._check_tree()

    def _check_tree(self) -> None:
        stack, seen, named = list(self._tree.root.children.values()), 0, Counter[int]()
        while stack:
            node = stack.pop()
            seen += 1
            stack.extend(node.children.values())
            if node.blocks[self._telling]:
                named.update(node.names)
            for group, block in enumerate(node.blocks):
                if block and self._pools[group].owner(block) != (node, group):
                    raise ValueError(f"prefix node and pool disagree on block {block} of group {group}")
            if node.empty:
                raise ValueError("an empty prefix node was kept")
        if named != self.named.held:
            raise ValueError("prefixes that are cached and those that routers are told of differ")
        if seen != self._tree.num_nodes:
            raise ValueError(f"{seen} prefix nodes are reachable, {self._tree.num_nodes} exist")
