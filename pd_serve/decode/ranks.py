"""The inboxes of an engine's ranks as one: a prompt has arrived when every rank has its heads of it.

:class:`RankedInbox` is rank 0's, with the calls and events of :class:`~pd_serve.decode.inbox.Inbox`, on the main
thread; :class:`RemoteInbox` is another rank's end of it. A key that fails at one rank is given up at all of them, and
is drained when no transfer of any rank can write its blocks any more.
"""

from __future__ import annotations

import select
from dataclasses import dataclass, field

import msgspec
import numpy as np

from pd_serve.decode.inbox import Arrived, Drained, Event, Failed, Inbox, Offered
from pd_serve.decode.incoming import I32
from pd_serve.errors import FailureKind
from pd_serve.transfer.relay import Relays
from pd_serve.wire.link import Source

NAME = "inbox"


class _Connect(msgspec.Struct, frozen=True, tag=True):
    source: Source


class _Expect(msgspec.Struct, frozen=True, tag=True):
    key: str
    source: Source


class _Accept(msgspec.Struct, frozen=True, tag=True):
    key: str
    tables: list[bytes]  # int32, little endian
    first_block: list[int]


class _Cancel(msgspec.Struct, frozen=True, tag=True):
    key: str


_calls = msgspec.msgpack.Decoder(_Connect | _Expect | _Accept | _Cancel)
_events = msgspec.msgpack.Decoder(Offered | Arrived | Failed | Drained)
_encode = msgspec.msgpack.Encoder().encode


@dataclass
class _Key:
    """What the ranks have said of it."""

    ranks: int
    awaited: set[int]  # ranks at which it has not ended
    offered: dict[int, int] = field(default_factory=dict)  # tokens ready
    arrived: dict[int, Arrived] = field(default_factory=dict)
    given_up: bool = False

    def end(self, key: str) -> list[Event]:
        """Its last events, when it has ended at every rank."""
        parts = list(self.arrived.values())
        if self.given_up or len(parts) < self.ranks:
            return [Drained(key)]
        tokens = {part.first_token for part in parts}
        if len(tokens) > 1:
            why = "ranks of the prefill node announced different first tokens"
            return [Failed(key, FailureKind.TRANSFER, why), Drained(key)]
        return [
            Arrived(
                key,
                tokens.pop(),
                sum(part.size_bytes for part in parts),
                max(part.seconds for part in parts),
                tuple(map(max, zip(*(part.whole_from for part in parts), strict=True))),
                parts[0].num_tokens,
            )
        ]


class RankedInbox:
    """``own``: rank 0's. Blocks have the same numbers on all ranks."""

    def __init__(self, own: Inbox, relays: Relays) -> None:
        self._own = own
        self._relays = relays
        self._keys: dict[str, _Key] = {}
        self._poll = select.epoll()
        for source in (own, relays):
            self._poll.register(source.fileno(), select.EPOLLIN)

    def connect(self, source: Source) -> None:
        self._relays.ask(NAME, _Connect(source))
        self._own.connect(source)

    def expect(self, key: str, source: Source) -> None:
        self._keys[key] = _Key(self._relays.count, set(range(self._relays.count)))
        self._relays.ask(NAME, _Expect(key, source))
        self._own.expect(key, source)

    def accept(self, key: str, tables: list[I32], first_block: list[int]) -> None:
        self._relays.ask(NAME, _Accept(key, [table.astype("<i4").tobytes() for table in tables], first_block))
        self._own.accept(key, tables, first_block)

    def cancel(self, key: str) -> None:
        if (known := self._keys.get(key)) is not None:
            known.given_up = True  # a rank that hears of the lease's end first says that it failed
        self._relays.ask(NAME, _Cancel(key))
        self._own.cancel(key)

    def fileno(self) -> int:
        """Readable while there may be events."""
        return self._poll.fileno()

    def events(self) -> list[Event]:
        """Raises TransferError where a transfer thread has given up or a rank is gone."""
        came: list[tuple[int, Event]] = [(0, event) for event in self._own.events()]
        came += [(rank, _events.decode(message)) for rank, message in self._relays.said(NAME)]
        return [told for rank, event in came for told in self._told(rank, event)]

    def _told(self, rank: int, event: Event) -> list[Event]:
        """What is to be said of the key, now that this is known."""
        key = self._keys.get(event.key)
        if key is None:
            return []
        match event:
            case Offered(_, num_tokens):
                key.offered[rank] = num_tokens
                everywhere = len(key.offered) == key.ranks
                return [Offered(event.key, min(key.offered.values()))] if everywhere and not key.given_up else []
            case Failed():
                if key.given_up:
                    return []
                self.cancel(event.key)
                return [event]
            case Arrived():
                key.arrived[rank] = event
        key.awaited.discard(rank)
        if key.awaited:
            return []
        del self._keys[event.key]
        return key.end(event.key)

    def misfits(self) -> dict[str, str]:
        return self._relays.misfits | self._own.misfits()

    def lanes(self) -> dict[str, float]:
        """Ranks read at the same time, each its share: as rank 0 does, so do all."""
        return self._own.lanes()

    def counters(self) -> dict[str, float]:
        return self._relays.total(NAME, self._own.counters())

    def close(self) -> None:
        """After the threads have ended."""
        self._poll.close()
        self._own.close()


class RemoteInbox:
    """See :class:`pd_serve.transfer.relay.End`."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def told(self, message: bytes) -> bytes | None:
        match _calls.decode(message):
            case _Connect(source):
                self._inbox.connect(source)
            case _Expect(key, source):
                self._inbox.expect(key, source)
            case _Accept(key, tables, first_block):
                self._inbox.accept(key, [np.frombuffer(table, "<i4") for table in tables], first_block)
            case _Cancel(key):
                self._inbox.cancel(key)
        return None

    def fileno(self) -> int:
        return self._inbox.fileno()

    def said(self) -> list[bytes]:
        return [_encode(event) for event in self._inbox.events()]

    def counters(self) -> dict[str, float]:
        return self._inbox.counters()

    def misfits(self) -> dict[str, str]:
        return self._inbox.misfits()

    def close(self) -> None:
        self._inbox.close()
