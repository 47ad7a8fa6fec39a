"""The outboxes of an engine's ranks as one: a request is leased at all of them, and its lease ends with the first.

:class:`RankedOutbox` is rank 0's, with the calls and events of :class:`~pd_serve.prefill.outbox.Outbox`, on the main
thread; :class:`RemoteOutbox` is another rank's end of it. Readers have a session with each rank that holds heads of
theirs, and confirm with each of them, so ranks agree without asking each other.
"""

from __future__ import annotations

import select

import msgspec

from pd_serve.prefill.outbox import LeaseEnded, Outbox
from pd_serve.transfer.relay import Relays
from pd_serve.wire.peer import Blocks

NAME = "outbox"
RELEASED = "released"


class _Listen(msgspec.Struct, frozen=True, tag=True):
    timeout_s: float


class _Open(msgspec.Struct, frozen=True, tag=True):
    key: str


class _Publish(msgspec.Struct, frozen=True, tag=True):
    key: str
    num_tokens: int
    blocks: list[Blocks]
    first: int | None


class _Cancel(msgspec.Struct, frozen=True, tag=True):
    key: str
    reason: str


_calls = msgspec.msgpack.Decoder(_Listen | _Open | _Publish | _Cancel)
_events = msgspec.msgpack.Decoder(LeaseEnded)
_encode = msgspec.msgpack.Encoder().encode


class RankedOutbox:
    """``own``: rank 0's. Blocks have the same numbers on all ranks."""

    def __init__(self, own: Outbox, relays: Relays) -> None:
        self._own = own
        self._relays = relays
        self._leased: dict[str, set[int]] = {}  # ranks whose lease of a key has not ended
        self._poll = select.epoll()
        for source in (own, relays):
            self._poll.register(source.fileno(), select.EPOLLIN)

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        """Lets readers in at all ranks; the addresses by rank. Idempotent. Raises TransferError."""
        self._relays.ask(NAME, _Listen(timeout_s))
        own = self._own.listen(timeout_s)
        return (*own, *(answer.decode() for answer in self._relays.answers(f"{NAME}:answer", timeout_s)))

    def open(self, key: str) -> None:
        self._leased[key] = set(range(self._relays.count))
        self._relays.ask(NAME, _Open(key))
        self._own.open(key)

    def publish(self, key: str, num_tokens: int, blocks: list[Blocks], first: int | None) -> None:
        """What rank 0 has computed the others have, too: its last sum had a part of each."""
        self._relays.ask(NAME, _Publish(key, num_tokens, blocks, first))
        self._own.publish(key, num_tokens, blocks, first)

    def cancel(self, key: str, reason: str) -> None:
        self._leased.pop(key, None)
        self._relays.ask(NAME, _Cancel(key, reason))
        self._own.cancel(key, reason)

    def fileno(self) -> int:
        """Readable while there may be events."""
        return self._poll.fileno()

    def events(self) -> list[LeaseEnded]:
        """Raises TransferError where a transfer thread has given up or a rank is gone."""
        came = [(0, event) for event in self._own.events()]
        came += [(rank, _events.decode(message)) for rank, message in self._relays.said(NAME)]
        return [ended for rank, event in came if (ended := self._ended(rank, event)) is not None]

    def _ended(self, rank: int, event: LeaseEnded) -> LeaseEnded | None:
        ranks = self._leased.get(event.key)
        if ranks is None:
            return None
        ranks.discard(rank)
        if event.why != RELEASED:
            self.cancel(event.key, event.why)  # nobody will have all of it
        elif ranks:
            return None
        self._leased.pop(event.key, None)
        return event

    def counters(self) -> dict[str, float]:
        return self._relays.total(NAME, self._own.counters())

    @property
    def num_leases(self) -> int:
        return len(self._leased)

    def close(self) -> None:
        """After the threads have ended."""
        self._poll.close()
        self._own.close()


class RemoteOutbox:
    """See :class:`pd_serve.transfer.relay.End`."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def told(self, message: bytes) -> bytes | None:
        match _calls.decode(message):
            case _Listen(timeout_s):
                (address,) = self._outbox.listen(timeout_s)
                return address.encode()
            case _Open(key):
                self._outbox.open(key)
            case _Publish(key, num_tokens, blocks, first):
                self._outbox.publish(key, num_tokens, blocks, first)
            case _Cancel(key, reason):
                self._outbox.cancel(key, reason)
        return None

    def fileno(self) -> int:
        return self._outbox.fileno()

    def said(self) -> list[bytes]:
        return [_encode(event) for event in self._outbox.events()]

    def counters(self) -> dict[str, float]:
        return self._outbox.counters()

    def misfits(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._outbox.close()
