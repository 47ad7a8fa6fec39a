"""What an engine does for others: its abilities to send and to receive KV, as the engine calls them on its main thread.

An engine has both from its start, on one transfer thread over one set of lanes, and none while it sleeps. Which
sequence goes which way the router says: one with ``handoff`` is the sender's, one with a ``source`` the receiver's, all
others are computed here. So the role that a node has at the moment is the routers' business; only the door, through
which readers come in, opens when the role first includes prefill.
"""

from __future__ import annotations

import select
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from pd_serve.engine.sequence import Sequence
from pd_serve.wire.link import Output, Peers, Source

Events = Iterator[tuple[Sequence, Output]]


class Transfer(Protocol):
    """The transfer thread."""

    @property
    def internal_errors(self) -> int: ...

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until it serves. Raises TransferError."""

    @property
    def transport(self) -> str:
        """Names of the transports that run, separated by commas; after ``wait_ready``."""

    def close(self) -> bool:
        """Says goodbye to peers and withdraws the pool from them. True: no transfer touches the pool any more."""


class Sender(Protocol):
    """For sequences with ``handoff``: others decode what is computed here."""

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        """Lets readers in; returns the addresses they dial, one a rank. Idempotent. Raises TransferError."""

    def fileno(self) -> int: ...

    def submitted(self, seq: Sequence) -> None: ...

    def computed(self, seq: Sequence, token: int | None) -> None: ...

    def ended(self, seq: Sequence, reason: str) -> None: ...

    def abandoned(self, key: str) -> None: ...

    def dropped(self, origin: int) -> None: ...

    def events(self) -> Events: ...

    @property
    def leases(self) -> int: ...

    def counters(self) -> dict[str, float]: ...

    def close(self) -> None:
        """After the transfer thread: what it held for anybody is nobody's then."""


class Receiver(Protocol):
    """For sequences with a ``source``: their prompts are computed elsewhere."""

    def fileno(self) -> int: ...

    def submitted(self, seq: Sequence, source: Source) -> Output: ...

    def ended(self, seq: Sequence) -> None: ...

    def events(self) -> Events: ...

    def relent(self, leases: int) -> Events:
        """After ``events``: gives up what only this node's own leases keep waiting."""

    def peers(self, peers: Peers) -> None: ...

    @property
    def queued(self) -> int: ...

    @property
    def pulling(self) -> int: ...

    def counters(self) -> dict[str, float]: ...

    def misfits(self) -> dict[str, str]: ...

    def lanes(self) -> dict[str, float]: ...

    def close(self) -> None:
        """After the transfer thread."""


class Role:
    """Without arguments: that of an engine that sleeps, which is asked for nothing."""

    def __init__(
        self, transfer: Transfer | None = None, sender: Sender | None = None, receiver: Receiver | None = None
    ) -> None:
        self._transfer = transfer
        self._sender = sender
        self._receiver = receiver
        self._poll = select.epoll()
        for ability in (sender, receiver):
            if ability is not None:
                self._poll.register(ability.fileno(), select.EPOLLIN)

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until the transfer thread serves. Raises TransferError."""
        if self._transfer is not None:
            self._transfer.wait_ready(timeout_s)

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        """Lets readers in; the addresses they dial. Idempotent. Raises TransferError."""
        return () if self._sender is None else self._sender.listen(timeout_s)

    def fileno(self) -> int:
        """Readable while :meth:`events` has something; the engine sleeps on it."""
        return self._poll.fileno()

    def submitted(self, seq: Sequence) -> Output | None:
        """Takes over a new sequence (its state is then not WAITING) or leaves it to be computed here.

        May answer with an output at once.
        """
        if seq.handoff and self._sender is not None:
            self._sender.submitted(seq)
        elif seq.source is not None and self._receiver is not None:
            return self._receiver.submitted(seq, seq.source)
        return None

    def computed(self, seq: Sequence, token: int | None) -> None:
        """``seq.num_computed`` tokens have their KV; ``token``: the one sampled, if this step reached the end.

        Where the sender takes the blocks over, ``seq.blocks`` is None then and the state FINISHED.
        """
        if seq.handoff and self._sender is not None:
            self._sender.computed(seq, token)

    def ended(self, seq: Sequence, reason: str) -> None:
        """The sequence is over for this engine (aborted, failed, finished) before ``computed`` took it over."""
        if seq.handoff and self._sender is not None:
            self._sender.ended(seq, reason)
        elif seq.source is not None and self._receiver is not None:
            self._receiver.ended(seq)

    def abandoned(self, key: str) -> None:
        """A router aborts an attempt that this engine has finished with: blocks may still be leased for it."""
        if self._sender is not None:
            self._sender.abandoned(key)

    def dropped(self, origin: int) -> None:
        """A router is gone, and with it whoever would read what is still held for its attempts."""
        if self._sender is not None:
            self._sender.dropped(origin)

    def events(self) -> Events:
        """Handles what has come in from the transfer thread; yields what the routers are to be told."""
        for ability in (self._sender, self._receiver):
            if ability is not None:
                yield from ability.events()
        if self._sender is not None and self._receiver is not None:
            yield from self._receiver.relent(self._sender.leases)

    def peers(self, peers: Peers) -> None:
        """The nodes that a router may name as sources."""
        if self._receiver is not None:
            self._receiver.peers(peers)

    @property
    def transport(self) -> str:
        """Names of the transports that run, separated by commas; after ``wait_ready``."""
        return "" if self._transfer is None else self._transfer.transport

    @property
    def queued(self) -> int:
        """Sequences that have no blocks yet and that the scheduler does not know of."""
        return 0 if self._receiver is None else self._receiver.queued

    @property
    def leases(self) -> int:
        return 0 if self._sender is None else self._sender.leases

    @property
    def pulling(self) -> int:
        return 0 if self._receiver is None else self._receiver.pulling

    def counters(self) -> dict[str, float]:
        counted: Counter[str] = Counter()
        for ability in (self._sender, self._receiver):
            if ability is not None:
                counted.update(ability.counters())
        if self._transfer is not None:
            counted["transfer_faults"] = self._transfer.internal_errors
        return {name: float(value) for name, value in counted.items()}

    def misfits(self) -> dict[str, str]:
        """The ids of sources that this node cannot read from, and why."""
        return {} if self._receiver is None else self._receiver.misfits()

    def lanes(self) -> dict[str, float]:
        """Prompt tokens a second, by the ids of sources that this node reads from."""
        return {} if self._receiver is None else self._receiver.lanes()

    def close(self) -> bool:
        """Says goodbye to peers and withdraws the pool from them; what it held for anybody is nobody's then.

        True: no transfer touches the pool any more.
        """
        closed = self._transfer is None or self._transfer.close()
        for ability in (self._sender, self._receiver):
            if ability is not None:
                ability.close()
        self._poll.close()
        return closed
