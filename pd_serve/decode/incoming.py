"""One prompt whose KV is on its way: what its prefill node has announced, what was pulled, and what that should sum to.

It comes in parts, one from each rank of the prefill node that holds heads of this rank's, and has arrived when all
parts have. Data and arithmetic only; the inbox moves it along. Both nodes' blocks are taken apart into *pieces* (see
:mod:`pd_serve.transfer.slices`): piece ``i`` of a group covers the same prompt tokens on both, whatever pool block
holds it here or there, and whatever the block sizes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from pd_serve.errors import FailureKind, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.transfer.base import BlockMap, Pair, Pull
from pd_serve.transfer.movers.base import I64, U64, Sums
from pd_serve.transfer.slices import Slicing
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks, Ready

I32 = npt.NDArray[np.int32]
Place = tuple[list[I32], list[int]]  # tables and first blocks (:meth:`Part.accept`)

MAX_PIECES = 1 << 24  # of a request's group: bounds what a peer's message can make this node allocate


class Stage(Enum):
    """Of a part."""

    CONNECTING = "connecting"  # not all source ranks can be reached yet: none knows of us
    CLAIMED = "claimed"  # they do; nothing is ready, or no blocks are set aside here
    PULLING = "pulling"  # blocks are set aside: what is announced is pulled
    RELEASING = "releasing"  # all is here; may it be used?
    VALID = "valid"  # the lease had not ended when all was here


class _Group:
    """Announced and pulled pieces of one layer group, by their place in the prompt."""

    def __init__(self, slicing: Slicing, num_source_blocks: int, checksums: bool) -> None:
        self._slicing = slicing
        self._num_source_blocks = num_source_blocks
        self._checksums = checksums
        self.remote: I64 = np.full(0, -1, dtype=np.int64)  # pieces of the source; -1: not announced
        self.sums: U64 = np.zeros(0, dtype=np.uint64)
        self.taken: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # pulled, or being pulled

    @property
    def per_block(self) -> int:
        """Pieces in a block of this node."""
        return self._slicing.reader.pieces_per_block

    def announce(self, blocks: Blocks) -> None:
        each = self._slicing.source.pieces_per_block
        ids = np.frombuffer(blocks.ids, dtype="<i4").astype(np.int64)
        first, end = blocks.first * each, (blocks.first + len(ids)) * each
        if end > MAX_PIECES or bool(((ids <= 0) | (ids >= self._num_source_blocks)).any()):
            raise TransferError(FailureKind.TRANSFER, "the prefill node announced blocks that cannot exist")
        if len(blocks.checksums) != (8 * len(ids) * each if self._checksums else 0):
            raise TransferError(FailureKind.TRANSFER, "the prefill node's checksums are not those of its blocks")
        pieces = ids if each == 1 else (ids[:, None] * each + np.arange(each, dtype=np.int64)).ravel()
        if end > len(self.remote):
            more = end - len(self.remote)
            self.remote = np.concatenate([self.remote, np.full(more, -1, dtype=np.int64)])
            self.sums = np.concatenate([self.sums, np.zeros(more, dtype=np.uint64)])
            self.taken = np.concatenate([self.taken, np.zeros(more, dtype=np.bool_)])
        known = self.remote[first:end]
        if bool(((known >= 0) & (known != pieces)).any()):
            raise TransferError(FailureKind.TRANSFER, "the prefill node announced a block twice in different places")
        self.remote[first:end] = pieces
        if self._checksums:
            new = ~self.taken[first:end]
            self.sums[first:end][new] = np.frombuffer(blocks.checksums, dtype="<u8")[new]

    def take(self, table: I32, first_block: int) -> tuple[I64, I64, U64]:
        """Announced pieces not taken yet that have a place here: ``(remote, local, sums)``."""
        each = self.per_block
        first, end = first_block * each, min(len(table) * each, len(self.remote))
        place = table[first_block : -(-end // each)].astype(np.int64)
        if each > 1:
            place = (place[:, None] * each + np.arange(each, dtype=np.int64)).ravel()[: max(0, end - first)]
        new = (place >= each) & (self.remote[first:end] >= 0) & ~self.taken[first:end]
        self.taken[first:end] |= new
        return self.remote[first:end][new], place[new], self.sums[first:end][new]

    def missing(self, table: I32, first_block: int, end: int) -> I64:
        """Pieces before ``end`` that have a place here and were not taken."""
        at = np.arange(first_block * self.per_block, end, dtype=np.int64)
        at = at[table[at // self.per_block] > 0]
        beyond = at >= len(self.taken)
        missing: I64 = at[beyond | ~self.taken[np.minimum(at, max(0, len(self.taken) - 1))]] if len(self.taken) else at
        return missing


@dataclass
class Check:
    """Checksums of pieces that have arrived, on their way."""

    sums: Sums
    announced: U64


class Incoming:
    """``ranks``: of the source, those that are read from. ``place``: where to, if that was known from the start."""

    def __init__(self, key: str, source: Source, ranks: Iterable[int] = (0,), place: Place | None = None) -> None:
        self.key = key
        self.source = source
        self.place = place
        self.offered = False
        self.parts = [Part(self, rank, source.addresses[rank]) for rank in ranks]

    @property
    def connecting(self) -> bool:
        return any(part.stage is Stage.CONNECTING for part in self.parts)

    @property
    def announced_s(self) -> float:
        """When a rank had announced all of its part; ``inf`` before. The others compute the same: they follow soon."""
        return min((part.announced_s for part in self.parts), default=float("inf"))

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """During which bytes moved, in the part that took longest."""
        return max(part.seconds for part in self.parts)

    def arrived(self) -> tuple[int, tuple[int, ...]] | None:
        """First token, and ``whole_from`` (:meth:`Part.check_complete`), once all parts are here and valid.

        Raises TransferError where ranks have computed different things.
        """
        if any(part.checks or part.stage is not Stage.VALID for part in self.parts):
            return None
        ends = {(part.num_tokens, part.first_token) for part in self.parts}
        if len(ends) > 1:
            raise TransferError(
                FailureKind.TRANSFER, "ranks of the prefill node announced different ends of the prompt"
            )
        first_token = self.parts[0].first_token
        assert first_token is not None
        return first_token, tuple(map(max, zip(*(part.whole_from or () for part in self.parts), strict=True)))


@dataclass(eq=False)
class Part:
    """What one source rank has of a prompt."""

    whole: Incoming = field(repr=False)
    rank: int
    address: str
    stage: Stage = Stage.CONNECTING
    tables: list[I32] = field(default_factory=list)  # a group: logical to local block, 0 = no place here
    first_block: list[int] = field(default_factory=list)
    num_tokens: int = 0
    first_token: int | None = None
    pull: Pull | None = None
    pulled: list[tuple[BlockMap, U64]] = field(default_factory=list)  # what ``pull`` reads, and its announced sums
    pull_started_s: float = 0.0
    checks: list[Check] = field(default_factory=list)
    whole_from: tuple[int, ...] | None = None  # see ``check_complete``
    announced_s: float = float("inf")  # when the last announcement came
    moved_s: float = 0.0  # when something last moved
    size_bytes: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._groups: list[_Group | None] = []  # None: read from another rank
        self._announced = False  # since the last ``take``

    @property
    def key(self) -> str:
        return self.whole.key

    @property
    def held(self) -> bool:
        """The rank holds a lease for it, as long as it hears of us."""
        return self.stage in (Stage.CLAIMED, Stage.PULLING)

    @property
    def awaited(self) -> bool:
        """The rank still computes it, or has it queued."""
        return self.held and self.first_token is None

    @property
    def awaits_answer(self) -> bool:
        """The main thread is about to name blocks, or the prefill node to confirm the lease."""
        return self.stage is Stage.RELEASING or (self.stage is Stage.CLAIMED and self.whole.offered)

    @property
    def all_taken(self) -> bool:
        """The last announcement has come, and what it announced is here or being pulled."""
        return self.first_token is not None and not self._announced

    def claimed(self, pair: Pair, checksums: bool, reads: tuple[bool, ...]) -> None:
        """The rank is known: how its pool and this one fit together. ``reads``: whether a group is read from it."""
        self._groups = [
            _Group(slicing, region.num_blocks, checksums) if read else None
            for slicing, region, read in zip(pair.slicings[:-1], pair.source[:-1], reads, strict=True)
        ]
        self.stage = Stage.CLAIMED

    def announce(self, ready: Ready) -> None:
        """Takes note of what is ready. Raises TransferError for what cannot be."""
        self._announced = True
        self.whole_from = None
        for blocks in ready.blocks:
            if not 0 <= blocks.group < len(self._groups) or blocks.first < 0 or len(blocks.ids) % 4:
                raise TransferError(FailureKind.TRANSFER, "the prefill node's announcement makes no sense")
            group = self._groups[blocks.group]
            if group is not None:
                group.announce(blocks)
        self.num_tokens = max(self.num_tokens, ready.num_tokens)
        if ready.first is not None:
            self.first_token = ready.first.token

    def accept(self, tables: list[I32], first_block: list[int]) -> None:
        if len(tables) != len(self._groups) or len(first_block) != len(self._groups):
            raise ValueError(f"{len(self._groups)} tables and first blocks are needed")
        self.tables, self.first_block = tables, first_block
        self.stage = Stage.PULLING

    def take(self) -> list[tuple[BlockMap, U64]]:
        """What can be pulled now, with its announced checksums; counts as pulled from here on."""
        self._announced = False
        maps = []
        for index, group in enumerate(self._groups):
            if group is None:
                continue
            remote, local, sums = group.take(self.tables[index], self.first_block[index])
            if len(remote):
                maps.append((BlockMap(index, remote, local), sums))
        return maps

    def check_complete(self, layout: KVLayout) -> tuple[int, ...]:
        """Once ``all_taken``: raises TransferError unless all that is needed was taken. Computed once.

        Needed is what tokens to come attend to. Returns for each group the first block from which on all is here that
        the prompt has: with a window and another block size than here, the prefill node may hold less than whole
        blocks of this node at the window's edge. Earlier blocks must not be offered to other prompts.
        """
        if self.whole_from is not None:
            return self.whole_from
        whole_from = []
        end_block = layout.blocks_for(self.num_tokens)
        for index, group in enumerate(self._groups):
            first, table = self.first_block[index], self.tables[index]
            if group is None or first >= end_block:
                whole_from.append(0)
                continue
            if len(table) < end_block:
                raise TransferError(
                    FailureKind.TRANSFER, f"{end_block} blocks are needed and only {len(table)} have a place here"
                )
            piece_tokens = layout.block_size // group.per_block
            missing = group.missing(table, first, -(-self.num_tokens // piece_tokens))
            window = layout.groups[index].window
            seen_from = 0 if window is None else max(0, self.num_tokens - window + 1)
            needed = int(np.count_nonzero((missing + 1) * piece_tokens > seen_from))
            if needed:
                raise TransferError(
                    FailureKind.TRANSFER, f"the prefill node never announced {needed} pieces of the prompt"
                )
            whole_from.append(int(missing.max()) // group.per_block + 1 if len(missing) else 0)
        self.whole_from = tuple(whole_from)
        return self.whole_from

    def open_checks(self) -> bool:
        """Whether checksums are still on their way; drops those that hold. Raises TransferError where one does not."""
        while self.checks and self.checks[0].sums.done():
            check = self.checks.pop(0)
            wrong = int(np.count_nonzero(check.sums.result() != check.announced))
            if wrong:
                raise TransferError(
                    FailureKind.CHECKSUM,
                    f"{wrong} of {len(check.announced)} pieces are not what the prefill node announced: memory was "
                    f"reused too early, or the transport delivers wrong bytes",
                )
        return bool(self.checks)
