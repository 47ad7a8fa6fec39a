"""The prefix cache: a tree of token blocks.

A node stands for one full block of tokens after its parent's; its identity is the whole chain from
the root, and a child is found by its parent *and* its exact tokens. That is the chained block hash of
vLLM (https://docs.vllm.ai/en/latest/design/prefix_caching/) with the comparison built in: the
dictionary hashes a block's bytes and then compares them, so a collision costs a comparison and can
never serve another prompt's KV. Prompts with a salt have a root of their own, a node without blocks below
the common one: nothing is found from one root that was computed under another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class PrefixNode:
    """``blocks[group]``: the pool block that holds this content, 0 = none. ``users``: sequences standing here.

    ``host``: the same for the host tier (:mod:`pd_serve.kv.tiers`), whose copy may not be complete yet; None: none
    at all. ``names``: what routers call the prefixes that end in this block (:mod:`pd_serve.wire.chunks`)."""

    __slots__ = ("blocks", "children", "host", "key", "names", "parent", "users")

    def __init__(self, parent: PrefixNode | None, key: bytes, num_groups: int) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[bytes, PrefixNode] = {}
        self.blocks = [0] * num_groups
        self.host: list[int] | None = None
        self.users = 0
        self.names: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing needs it."""
        return not (self.children or self.users or self.host or any(self.blocks))


class PrefixTree:
    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.root = PrefixNode(None, b"", num_groups)
        self.num_nodes = 0

    def start(self, salt: bytes) -> PrefixNode:
        """The root of prompts with this salt, made if it is not there."""
        return self.child(self.root, _salt_key(salt)) if salt else self.root

    def find(self, salt: bytes) -> PrefixNode | None:
        """The root of prompts with this salt, where there is one."""
        return self.root.children.get(_salt_key(salt)) if salt else self.root

    def walk(self, keys: list[bytes], salt: bytes = b"") -> list[PrefixNode]:
        """The nodes along ``keys``, as far as they exist."""
        own = self.find(salt)
        return [] if own is None else self.walk_from(own, keys)

    def walk_from(self, node: PrefixNode, keys: list[bytes]) -> list[PrefixNode]:
        path = list[PrefixNode]()
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def child(self, node: PrefixNode, key: bytes) -> PrefixNode:
        """The child with these tokens, made if it is not there."""
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = PrefixNode(node, key, self.num_groups)
            self.num_nodes += 1
        return child

    def prune(self, node: PrefixNode) -> None:
        """Removes ``node`` and its ancestors as far as nothing needs them."""
        while node.parent is not None and node.empty:
            del node.parent.children[node.key]
            self.num_nodes -= 1
            node = node.parent


def _salt_key(salt: bytes) -> bytes:
    """The key of no block: their lengths are multiples of 4."""
    padding = 1 + -len(salt) % 4
    return salt + bytes([padding]) * padding


def block_keys(tokens: npt.NDArray[np.int32], block_size: int, first: int, last: int) -> list[bytes]:
    """Keys of the logical blocks ``first .. last - 1`` of a sequence: their tokens' bytes."""
    step = block_size * 4
    data = tokens[first * block_size : last * block_size].tobytes()
    return [data[i : i + step] for i in range(0, len(data), step)]
