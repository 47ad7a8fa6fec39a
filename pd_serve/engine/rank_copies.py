"""Copies to and from the host tiers of an engine with several ranks: each has a tier of its own, with the same books.

Rank 0's main thread says which blocks are copied, as in an engine of one rank. What it says goes the way that steps go
(:mod:`pd_serve.engine.line`) and overtakes none: a block that is put by has been computed by every rank then, as rank 0
has had logits from all of them. Each rank says by a socket what has ended; for the engine a copy has when it has at all
of them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pd_serve.compute import copies
from pd_serve.compute.copies import Ended, HostCopies
from pd_serve.engine import line
from pd_serve.engine.line import Kind
from pd_serve.kv.tiers import Copy

_ENDED = struct.Struct("<Q?d")  # as Ended


@dataclass
class _Open:
    ranks: int  # where it has not ended
    whole: bool = True
    seconds: float = 0.0


class RankedCopies:
    """:class:`pd_serve.engine.arrivals.Copies` of all ranks. ``own``: rank 0's, which it owns; ``tell``: sends to all
    others; ``sockets``: what each of these says (:func:`tell_by`).
    """

    def __init__(self, own: HostCopies, tell: Callable[[Kind, bytes], None], sockets: Sequence[socket.socket]) -> None:
        self.num_slots = own.num_slots
        self._own = own
        self._tell = tell
        self._sockets = sockets
        self._open: dict[int, _Open] = {}
        self._ready: list[Ended] = []
        self._poll = select.epoll()
        self._poll.register(own.fileno(), select.EPOLLIN)
        for each in sockets:
            each.setblocking(False)
            self._poll.register(each, select.EPOLLIN | select.EPOLLET)

    def fileno(self) -> int:
        return self._poll.fileno()

    def load(self, ticket: int, wanted: list[Copy]) -> None:
        self._begin(ticket, line.Load(ticket, list(wanted)))
        self._own.load(ticket, wanted)

    def store(self, ticket: int, wanted: list[Copy]) -> None:
        self._begin(ticket, line.Store(ticket, list(wanted)))
        self._own.store(ticket, wanted)

    def _begin(self, ticket: int, message: line.Load | line.Store) -> None:
        self._open[ticket] = _Open(1 + len(self._sockets))
        self._tell(Kind.COPIES, line.encode(message))

    def ended(self) -> list[Ended]:
        self._gather()
        found, self._ready = self._ready, []
        return found

    def _gather(self) -> None:
        self._poll.poll(0)  # what has been said is looked at now
        for ended in self._own.ended():
            self._book(ended)
        for each in self._sockets:
            with contextlib.suppress(BlockingIOError, ConnectionError):  # a rank that ends takes the engine with it
                while said := each.recv(_ENDED.size):
                    self._book(Ended(*_ENDED.unpack(said)))

    def _book(self, ended: Ended) -> None:
        state = self._open[ended.ticket]
        state.ranks -= 1
        state.whole &= ended.whole
        state.seconds = max(state.seconds, ended.seconds)
        if not state.ranks:
            del self._open[ended.ticket]
            self._ready.append(Ended(ended.ticket, state.whole, state.seconds))

    def drain(self) -> None:
        deadline_s = time.monotonic() + copies.DRAIN_S
        self._own.drain()
        self._gather()
        while self._open:
            if not self._poll.poll(max(0.0, deadline_s - time.monotonic())):
                raise copies.does_not_end()
            self._gather()

    def discard(self) -> None:
        self.drain()
        self._tell(Kind.COPIES, line.encode(line.Discard()))
        self._own.discard()

    def close(self) -> None:
        self._poll.close()
        self._own.close()


def tell_by(sock: socket.socket) -> Callable[[Ended], None]:
    """What a rank's copies tell, by a socket of type SOCK_SEQPACKET."""

    def tell(ended: Ended) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone, and this one will be
            sock.send(_ENDED.pack(*ended))

    return tell


def obey(own: HostCopies, payload: bytes) -> None:
    """At a rank beyond the first: what rank 0 said."""
    match line.decode_copies(payload):
        case line.Load(ticket, wanted):
            own.load(ticket, [Copy(*copy) for copy in wanted])
        case line.Store(ticket, wanted):
            own.store(ticket, [Copy(*copy) for copy in wanted])
        case line.Discard():
            own.discard()
