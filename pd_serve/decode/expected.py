"""One request whose KV is on its way: which blocks its prefill node has announced, and which were pulled.

Data and arithmetic only; the inbox moves it along. Logical block ``i`` of a group covers the same prompt
tokens on both nodes, whatever pool block holds it here or there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from pd_serve.errors import TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.transfer.base import BlockMap, Pull
from pd_serve.wire.link import Source
from pd_serve.wire.peer import FailureKind, Ready

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

MAX_LOGICAL_BLOCKS = 1 << 24  # bounds what a peer's message can make this node allocate


class Stage(Enum):
    CONNECTING = "connecting"  # the prefill node does not know of us yet
    CLAIMED = "claimed"  # it does; nothing is ready, or no blocks are set aside here
    PULLING = "pulling"  # blocks are set aside: what is announced is pulled
    RELEASING = "releasing"  # all is here; may it be used?


class _Group:
    """Announced and pulled blocks of one layer group, by logical block."""

    def __init__(self) -> None:
        self.remote: I64 = np.full(0, -1, dtype=np.int64)  # -1: not announced
        self.taken: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # pulled, or being pulled

    def announce(self, first: int, ids: I64) -> None:
        end = first + len(ids)
        if end > len(self.remote):
            more = end - len(self.remote)
            self.remote = np.concatenate([self.remote, np.full(more, -1, dtype=np.int64)])
            self.taken = np.concatenate([self.taken, np.zeros(more, dtype=np.bool_)])
        known = self.remote[first:end]
        if bool(((known >= 0) & (known != ids)).any()):
            raise TransferError(FailureKind.TRANSFER, "the prefill node announced a block twice in different places")
        self.remote[first:end] = ids

    def take(self, table: I32, first: int) -> tuple[I64, I64]:
        """Announced blocks not taken yet that have a place here: ``(remote, local)``."""
        end = min(len(table), len(self.remote))
        logical = np.flatnonzero((self.remote[:end] >= 0) & ~self.taken[:end])
        logical = logical[logical >= first]
        local = table[logical].astype(np.int64)
        logical, local = logical[local > 0], local[local > 0]
        self.taken[logical] = True
        return self.remote[logical], local


@dataclass
class Expected:
    key: str
    source: Source
    num_groups: int
    stage: Stage = Stage.CONNECTING
    offered: bool = False
    tables: list[I32] = field(default_factory=list)  # a group: logical to local block, 0 = no place here
    first_block: list[int] = field(default_factory=list)
    num_tokens: int = 0
    first_token: int | None = None
    pull: Pull | None = None
    pull_started_s: float = 0.0
    moved_s: float = 0.0  # when something last moved
    size_bytes: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._groups = [_Group() for _ in range(self.num_groups)]

    def announce(self, ready: Ready) -> None:
        """Takes note of what is ready. Raises TransferError for what cannot be."""
        for blocks in ready.blocks:
            if not 0 <= blocks.group < self.num_groups or blocks.first < 0 or len(blocks.ids) % 4:
                raise TransferError(FailureKind.TRANSFER, "the prefill node's announcement makes no sense")
            ids = np.frombuffer(blocks.ids, dtype="<i4").astype(np.int64)
            if blocks.first + len(ids) > MAX_LOGICAL_BLOCKS or bool((ids <= 0).any()):
                raise TransferError(FailureKind.TRANSFER, "the prefill node announced blocks that cannot exist")
            self._groups[blocks.group].announce(blocks.first, ids)
        self.num_tokens = max(self.num_tokens, ready.num_tokens)
        if ready.first is not None:
            self.first_token = ready.first.token

    def accept(self, tables: list[I32], first_block: list[int]) -> None:
        if len(tables) != self.num_groups or len(first_block) != self.num_groups:
            raise ValueError(f"{self.num_groups} tables and first blocks are needed")
        self.tables, self.first_block = tables, first_block
        self.stage = Stage.PULLING

    def take(self) -> list[BlockMap]:
        """What can be pulled now; counts as pulled from here on."""
        maps = []
        for index, group in enumerate(self._groups):
            remote, local = group.take(self.tables[index], self.first_block[index])
            if len(remote):
                maps.append(BlockMap(index, remote, local))
        return maps

    def check_complete(self, layout: KVLayout) -> None:
        """After the last announcement and the last pull: raises TransferError unless every block wanted is here."""
        end = layout.blocks_for(self.num_tokens)
        for index, group in enumerate(self._groups):
            first, table = self.first_block[index], self.tables[index]
            if first >= end:
                continue
            if len(table) < end:
                raise TransferError(
                    FailureKind.TRANSFER, f"{end} blocks were announced and only {len(table)} have a place here"
                )
            wanted = table[first:end] > 0
            taken = np.zeros(end - first, dtype=np.bool_)
            known = group.taken[first:end]
            taken[: len(known)] = known
            if bool((wanted & ~taken).any()):
                missing = int((wanted & ~taken).sum())
                raise TransferError(FailureKind.TRANSFER, f"the prefill node never announced {missing} blocks")
