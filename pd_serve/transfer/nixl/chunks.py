"""What travels together in one staging slot: pieces of one packed pull, or of several.

A pull's pieces leave it in order, in as many chunks as it takes; small pulls share one. A chunk names the pieces of a
group together, whosever they are: the source packs them, and the reader unpacks them, in one launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pd_serve.transfer.base import BlockMap, Outcome, Pair, PullState
from pd_serve.transfer.movers.base import I64, Rows, Work
from pd_serve.transfer.nixl.reads import Read
from pd_serve.transfer.nixl.staging import PART_ALIGNMENT, lay_out
from pd_serve.transfer.packing.copies import unpack


class PackedPull(Outcome):
    """The packed part of a pull, ``size_bytes`` of payload."""

    def __init__(self, items: list[BlockMap], size_bytes: int) -> None:
        self.left_bytes = size_bytes  # in no chunk yet
        self._items = deque(items)
        self.unconfirmed = 0  # chunks whose source has not confirmed them
        self.chunks: set[Chunk] = set()  # that hold a local slot for it

    @property
    def wants(self) -> bool:
        """Pieces are left to ask for."""
        return bool(self._items) and self.state is PullState.RUNNING

    @property
    def next_group(self) -> int:
        """Of its next piece. Only if it ``wants``."""
        return self._items[0].group

    def cut(self, room_bytes: int, piece_bytes: Sequence[int]) -> tuple[list[BlockMap], int]:
        """The next pieces that fit into so much room, and the room that is left."""
        taken: list[BlockMap] = []
        while self._items:
            item = self._items[0]
            size = piece_bytes[item.group]
            count = min(len(item.remote), room_bytes // size)
            if count <= 0:
                break
            room_bytes -= count * size + PART_ALIGNMENT
            self.left_bytes -= count * size
            taken.append(BlockMap(item.group, item.remote[:count], item.local[:count]))
            if count < len(item.remote):
                self._items[0] = BlockMap(item.group, item.remote[count:], item.local[count:])
                break
            self._items.popleft()
        return taken, room_bytes

    def settle(self) -> None:
        if self.state is PullState.RUNNING and not self._items and not self.chunks and not self.unconfirmed:
            self.state = PullState.DONE


def take(pulls: deque[PackedPull], room_bytes: int, piece_bytes: Sequence[int]) -> list[tuple[PackedPull, BlockMap]]:
    """Pieces of the first pulls, at least one, as far as there is room. Pulls with none left are dropped."""
    taken: list[tuple[PackedPull, BlockMap]] = []
    while pulls:
        pull = pulls[0]
        if pull.wants:
            if not taken:
                room_bytes = max(room_bytes, piece_bytes[pull.next_group])
            items, room_bytes = pull.cut(room_bytes, piece_bytes)
            taken += [(pull, item) for item in items]
            if pull.wants:
                break
        pulls.popleft()
    return taken


def can_fill(pulls: Iterable[PackedPull], size_bytes: int) -> bool:
    """Whether they have so much left."""
    for pull in pulls:
        size_bytes -= pull.left_bytes if pull.wants else 0
        if size_bytes <= 0:
            return True
    return False


class Chunk:
    """A slot's worth, on its way. ``parts``: ``(group, pieces of the source)`` as they lie in the slot, one a group."""

    def __init__(self, ticket: int, slot: int, taken: list[tuple[PackedPull, BlockMap]], pair: Pair) -> None:
        self.ticket = ticket
        self.slot = slot  # here
        self.pulls = tuple(dict.fromkeys(pull for pull, _ in taken))
        groups = dict.fromkeys(item.group for _, item in taken)
        self.parts = [(group, together([i.remote for _, i in taken if i.group == group])) for group in groups]
        self._local = [together([i.local for _, i in taken if i.group == group]) for group in groups]
        self._wanted = [np.ones(len(local), dtype=bool) for local in self._local]
        self._owners = [[(pull, len(i.local)) for pull, i in taken if i.group == group] for group in groups]
        self._pair = pair
        self._offsets, self.size_bytes = lay_out(pair.slicings, self.parts)
        self.waiting = set(self.pulls)  # who wants it still
        self.read: Read | None = None
        self.copies: list[tuple[Rows, Rows]] = []  # how it is unpacked; once it is being read
        self.freed = False  # the source's slot was given back
        self.work: Work | None = None

    def prepare(self, address: int) -> None:
        """Makes ``copies`` from the slot, which is at ``address``, to who waits."""
        self.copies = []
        parts = zip(self.parts, self._local, self._offsets, self._wanted, strict=True)
        for (group, _), local, offset, wanted in parts:
            staged, target = unpack(self._pair, group, local, address + offset)
            if not wanted.all():
                staged = replace(staged, starts=staged.starts[wanted])
                target = replace(target, starts=target.starts[wanted])
            self.copies.append((staged, target))

    def withdraw(self, pull: PackedPull) -> None:
        """It does not wait for this chunk any more; ``prepare`` it anew if it was prepared."""
        self.waiting.discard(pull)
        for part, owners in enumerate(self._owners):
            at = 0
            for owner, count in owners:
                if owner is pull:
                    self._wanted[part][at : at + count] = False
                at += count


def together(arrays: list[I64]) -> I64:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
