"""The transport interface: what a backend offers and what the rest of pd-serve may rely on.

Owned by the engine's transfer thread; no method may be called from two threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pd_serve.errors import TransferError
from pd_serve.memory.region import Region


@dataclass(frozen=True)
class BlockMap:
    """Blocks of one group to pull: ``remote[i]`` is read into ``local[i]`` (int64 block numbers, same length)."""

    group: int
    remote: npt.NDArray[np.int64]
    local: npt.NDArray[np.int64]


class PullState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Pull(Protocol):
    """One transfer in flight. Local blocks belong to it until it is DONE or FAILED (or ``close`` returned)."""

    size_bytes: int
    num_descriptors: int

    def poll(self) -> PullState:
        """Advances the transfer; never blocks."""

    def error(self) -> TransferError:
        """What went wrong, after FAILED."""

    def close(self) -> bool:
        """Ends it and frees its handles. True: no byte can be written to local blocks any more."""


class Peer(Protocol):
    """The other end of a pair, connected."""

    def close(self) -> None: ...


class Transport(Protocol):
    name: str

    def register(self, regions: Sequence[Region]) -> None:
        """Registers the pool, once, for the life of the node. Raises TransferError."""

    def describe(self) -> bytes:
        """What a peer needs to read this node's blocks; sent in the handshake. After ``register``."""

    def connect(self, peer: bytes) -> Peer:
        """Prepares reading from a peer that described itself so. Raises TransferError."""

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> Pull:
        """Starts reading. Raises TransferError where it cannot even start."""

    def progress(self) -> None:
        """Serves peers that read from this node, where the backend needs a turn for that."""

    def close(self) -> None: ...
