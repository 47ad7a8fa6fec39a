"""A source as its reader sees it: prepared lists, and the choice between reading directly and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import BlockMap, Outcome, Pair, PullState, Send
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.nixl.bindings import I32, Agent
from pd_serve.transfer.nixl.chunks import PackedPull, together
from pd_serve.transfer.nixl.direct import Index, LocalLists, in_order, listed
from pd_serve.transfer.nixl.limits import Limits
from pd_serve.transfer.nixl.local_ring import LocalRing
from pd_serve.transfer.nixl.reads import Read, Remote
from pd_serve.transfer.nixl.unpacker import Unpacker


class NixlPull(Outcome):
    """What is read directly and what travels packed, as one. See :class:`pd_serve.transfer.base.Pull`.

    Either part may be missing. It has failed as soon as one of them has.
    """

    work = None

    def __init__(
        self,
        size_bytes: int,
        num_descriptors: int,
        read: Read | None,
        packed: PackedPull | None,
        unpacker: Unpacker,
    ) -> None:
        self.size_bytes = size_bytes
        self.num_descriptors = num_descriptors
        self._read = read
        self._packed = packed
        self._unpacker = unpacker
        self._parts: list[Outcome] = [part for part in (read, packed) if part is not None]

    def poll(self) -> PullState:
        if self.state is PullState.RUNNING:
            if self._read is not None:
                self._read.poll()  # what is packed moves on with its transport
            states = [part.state for part in self._parts]
            if PullState.FAILED in states:
                self.fail(self._parts[states.index(PullState.FAILED)].error())
            elif PullState.RUNNING not in states:
                self.state = PullState.DONE
        return self.state

    def close(self) -> bool:
        packed_ended = True
        if self._packed is not None:
            self._unpacker.advance()
            packed_ended = self._unpacker.end(self._packed)
            self._unpacker.flush()
        read_ended = self._read is None or self._read.close()
        return packed_ended and read_ended


class NixlPeer:
    """One session's. See :class:`pd_serve.transfer.base.Peer`. Raises TransferError."""

    def __init__(
        self,
        agent: Agent,
        remote: Remote,
        lists: LocalLists,
        ring: LocalRing,
        pair: Pair,
        device: int | None,
        limits: Limits,
        send: Send,
        clock: Callable[[], float],
    ) -> None:
        self.remote = remote
        self._agent = agent
        self._lists = lists
        self._pair = pair
        self._limits = limits
        self._at_source = Index(pair.slicings, [s.source for s in pair.slicings], pair.source, limits)
        self._here = Index(pair.slicings, [s.reader for s in pair.slicings], pair.reader, limits)
        self._key, self._local = lists.take(self._here)
        try:
            self._prepared = agent.prepare(self._at_source.descriptors(), device, remote.name)
        except TransferError:
            lists.give_back(self._key)
            raise
        self.unpacker = Unpacker(ring, remote, pair, device, send, clock)
        self.closed = False
        remote.users += 1

    def receive(self, message: bytes) -> None:
        self.unpacker.receive(message)

    def pull(self, blocks: Sequence[BlockMap]) -> NixlPull:
        """Raises TransferError where it cannot even start."""
        self.remote.drop_ended()
        if self.remote.broken or self.closed:
            raise TransferError(FailureKind.PEER_LOST, "the prefill node's endpoint has failed")
        remote_ids: list[I64] = []
        local_ids: list[I64] = []
        items: list[BlockMap] = []
        size_bytes = packed_bytes = descriptors = 0
        for blockmap in blocks:
            if not len(blockmap.remote):
                continue
            slicing = self._pair.check(blockmap)
            size = slicing.piece_bytes * len(blockmap.remote)
            size_bytes += size
            if listed(slicing, self._limits):
                remote, local, count = in_order(slicing, blockmap.remote, blockmap.local)
                if count <= self._limits.direct_descriptors or size >= count * self._limits.direct_bytes:
                    remote_ids.append(self._at_source.entries(blockmap.group, remote))
                    local_ids.append(self._here.entries(blockmap.group, local))
                    descriptors += count
                    continue
            items.append(blockmap)
            packed_bytes += size
        read = packed = None
        if items:
            packed = PackedPull(items, packed_bytes)
            descriptors += 1 + packed_bytes // self._limits.slot_bytes  # about: a read for each slot
            self.unpacker.start(packed)
        if remote_ids:
            try:
                read = self.remote.read(self._local, _indices(local_ids), self._prepared, _indices(remote_ids))
            except TransferError:
                if packed is not None:
                    self.unpacker.end(packed)
                raise
        return NixlPull(size_bytes, descriptors, read, packed, self.unpacker)

    def close(self) -> None:
        """Gives the session up. What it reads goes on until it has ended; ``settle`` then frees the rest."""
        if not self.closed:
            self.closed = True
            self.unpacker.close()

    def settle(self) -> bool:
        """Once closed: True when everything was freed. Not to be called again then."""
        self.unpacker.advance()
        if not self.unpacker.idle or not self.remote.settle():
            return False
        self.unpacker.release()
        self._agent.release_list(self._prepared)
        self._lists.give_back(self._key)
        self.remote.users -= 1
        return True


def _indices(ids: list[I64]) -> I32:
    return together(ids).astype(np.int32)
