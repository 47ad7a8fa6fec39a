"""The transport interface: what a backend offers and what the rest of pd-serve may rely on.

A transport has two ends: the *reader* (a decode node: ``connect``, ``pull``) and the *source* (a prefill node:
``serve``). Owned by the engine's transfer thread; no method may be called from two threads at once, and none waits.

Ends of a pair may differ in block size and in tensor parallelism; see :mod:`pd_serve.transfer.slices` for *pieces*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.movers.base import Work
from pd_serve.transfer.slices import Slicing


@dataclass(frozen=True)
class BlockMap:
    """Pieces of one group to pull: ``remote[i]`` is read into ``local[i]`` (int64 piece numbers, same length).

    With the same block size on both sides a piece is a block. Otherwise it is a part of a block of the larger side:
    piece p of a node lies in its block ``p // pieces_per_block``.
    """

    group: int
    remote: npt.NDArray[np.int64]
    local: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """What two ends know of each other's pools, in the same orientation on both."""

    slicings: tuple[Slicing, ...]  # one a group, then the probe region's
    source: tuple[Region, ...]  # addresses in the source's process
    reader: tuple[Region, ...]  # addresses in the reader's process

    def check(self, blocks: BlockMap) -> Slicing:
        """The slicing of their group. Raises TransferError for pieces that the two pools do not have."""
        group = blocks.group
        if not 0 <= group < len(self.slicings) or len(blocks.remote) != len(blocks.local):
            why = f"there is no group {group}, or its two sides differ in length"
            raise TransferError(FailureKind.TRANSFER, f"a list of blocks that makes no sense: {why}")
        slicing = self.slicings[group]
        slicing.source.check(blocks.remote, self.source[group], "the prefill node")
        slicing.reader.check(blocks.local, self.reader[group], "this node")
        return slicing


class PullState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Outcome:
    """Where something is that ends once, and what went wrong. A lane's pull, or a part of one."""

    state = PullState.RUNNING
    _error: TransferError | None = None

    def fail(self, error: TransferError) -> None:
        """Unless it has ended."""
        if self.state is PullState.RUNNING:
            self.state = PullState.FAILED
            self._error = error

    def error(self) -> TransferError:
        assert self._error is not None, "only after FAILED"
        return self._error


class Pull(Protocol):
    """One transfer in flight. Local blocks belong to it until it is DONE or FAILED and ``close`` returned True."""

    size_bytes: int
    num_descriptors: int

    @property
    def work(self) -> Work | None:
        """The mover's copy that brings all of its bytes, while it is under way; None where something else does that."""

    def poll(self) -> PullState:
        """Where it is. Starts it, if need be; what moves it on is its transport's ``progress``. Never blocks."""

    def error(self) -> TransferError:
        """What went wrong, after FAILED."""

    def close(self) -> bool:
        """Ends it and frees its handles. True: no byte can be written to local blocks any more."""


# Sends a message of this transport to the other end of a pair, over the authenticated peer channel. Never blocks;
# ordered; lost only when the session is. Calling it after the session ended does nothing.
Send = Callable[[bytes], None]


class Peer(Protocol):
    """A source, as its reader sees it."""

    def receive(self, message: bytes) -> None:
        """A message of the source's :class:`Reader`. Raises TransferError for what makes no sense."""

    def close(self) -> None: ...


class Reader(Protocol):
    """A reader, as the source sees it: what it keeps for one session."""

    def receive(self, message: bytes) -> None:
        """A message of the reader's :class:`Peer`. Raises TransferError for what makes no sense."""

    def close(self) -> None:
        """The session has ended: frees everything held for it."""


class Transport(Protocol):
    name: str

    def register(self, memory: PoolMemory) -> None:
        """Registers the pool, once, for the life of the transport. Raises TransferError, with what to do about it."""

    def describe(self) -> bytes:
        """What a peer's transport of this name needs beside the :class:`Pair`; sent in the handshake. After
        ``register``.
        """

    def connect(self, source: bytes, pair: Pair, send: Send) -> Peer:
        """Reader: prepares reading from a source that described itself so. Raises TransferError, HandshakeError."""

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> Pull:
        """Reader: starts reading. Raises TransferError where it cannot even start."""

    def serve(self, reader: bytes, pair: Pair, send: Send) -> Reader:
        """Source: a reader that described itself so has authenticated itself. Raises TransferError, HandshakeError."""

    def progress(self) -> float:
        """Does what is due; returns in how many seconds it wants to be called again (``inf``: when woken)."""

    def close(self) -> bool:
        """Ends it. False: something may still read or write this node's memory, until the process ends."""
