"""What makes an engine a prefill or a decode engine: the hooks that the engine calls on its main thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from pd_serve.engine.sequence import Sequence
from pd_serve.wire.link import Output, Peers


class Role(Protocol):
    def wait_ready(self, timeout_s: float) -> str:
        """Waits until the transfer thread serves; returns the address peers dial. Raises TransferError."""

    def fileno(self) -> int:
        """Readable while :meth:`events` has something; the engine sleeps on it."""

    def submitted(self, seq: Sequence) -> Output | None:
        """Takes over a new sequence (its state is then not WAITING) or leaves it to be computed here.

        May answer with an output at once.
        """

    def computed(self, seq: Sequence, token: int | None) -> None:
        """``seq.num_computed`` tokens have their KV; ``token``: the one sampled, if this step reached the end.

        A role that takes the blocks over sets ``seq.blocks`` to None and the state to FINISHED.
        """

    def ended(self, seq: Sequence, reason: str) -> None:
        """The sequence is over for this engine (aborted, failed, finished) before ``computed`` took it over."""

    def abandoned(self, key: str) -> None:
        """A router aborts an attempt that this engine has finished with: a role may still hold blocks for it."""

    def dropped(self, origin: int) -> None:
        """A router is gone, and with it whoever would read what is still held for its attempts."""

    def events(self) -> Iterator[tuple[Sequence, Output]]:
        """Handles what has come in from the transfer thread; yields what the routers are to be told."""

    def peers(self, peers: Peers) -> None:
        """The prefill nodes that a router knows."""

    @property
    def transport(self) -> str:
        """Names of the transports that run, separated by commas; after ``wait_ready``."""

    @property
    def queued(self) -> int:
        """Sequences this role holds that have no blocks yet."""

    @property
    def leases(self) -> int: ...

    @property
    def pulling(self) -> int: ...

    def counters(self) -> dict[str, float]: ...

    def misfits(self) -> dict[str, str]:
        """Decode: the ids of sources that it cannot read from, and why."""

    def close(self) -> bool:
        """Says goodbye to peers and withdraws the pool from them; what it held for anybody is nobody's then.

        True: no transfer touches the pool any more.
        """


class NoRole:
    """What a sleeping engine has for a role: it refuses before it would ask this one anything."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)  # never readable
        self.queued = self.leases = self.pulling = 0
        self.transport = ""

    def wait_ready(self, timeout_s: float) -> str:
        raise AssertionError("nobody reaches a sleeping engine")

    def fileno(self) -> int:
        return self._fd

    def submitted(self, seq: Sequence) -> Output | None:
        raise AssertionError("a sleeping engine takes nothing")

    def computed(self, seq: Sequence, token: int | None) -> None:
        raise AssertionError("a sleeping engine computes nothing")

    def ended(self, seq: Sequence, reason: str) -> None:
        """It has no sequence."""

    def abandoned(self, key: str) -> None:
        """It holds nothing."""

    def dropped(self, origin: int) -> None:
        """It holds nothing."""

    def events(self) -> Iterator[tuple[Sequence, Output]]:
        return iter(())

    def peers(self, peers: Peers) -> None:
        """Routers name them again when the engine is awake."""

    def counters(self) -> dict[str, float]:
        return {}

    def misfits(self) -> dict[str, str]:
        return {}

    def close(self) -> bool:
        os.close(self._fd)
        return True
