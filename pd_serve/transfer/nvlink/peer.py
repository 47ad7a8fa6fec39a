"""The two ends of a session: what a reader keeps of its source (:class:`NvlinkPeer`) and the source of its reader.

A reader asks for the pool (``Want``), the source opens it and says how (``Offer``), the reader maps it. Pulls may be
queued from the beginning; they start when the mapping is there. Owned by the transport, on the transfer thread.
"""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from pd_serve.errors import FailureKind, PDServeError, TransferError
from pd_serve.transfer.base import Pair, Send
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.nvlink import messages
from pd_serve.transfer.nvlink.export import Exports
from pd_serve.transfer.nvlink.messages import Declined, Kind, Offer
from pd_serve.transfer.nvlink.sources import Source, Sources

log = logging.getLogger(__name__)

OFFER_TIMEOUT_S = 5.0


class NvlinkPeer:
    """A source. ``bases``, once mapped: where each of its regions is here, and its places (:meth:`Mapped.places`).
    ``error``: it cannot be read (any more)."""

    def __init__(self, sources: Sources, kind: Kind, pair: Pair, send: Send) -> None:
        self.pair = pair
        self.bases: list[tuple[int, I64]] | None = None
        self.error: TransferError | None = None
        self.source: Source | None = None
        self._sources = sources
        self._kind = kind
        self._offer_until_s = time.monotonic() + OFFER_TIMEOUT_S
        send(messages.encode(messages.Want()))

    def receive(self, message: bytes) -> None:
        found = messages.to_reader(message)
        if self.error is not None:
            return  # too late
        match found:
            case Declined():
                self._give_up(TransferError(FailureKind.CONNECT, f"the source cannot be read: {found.reason}"))
            case Offer():
                if found.kind is not self._kind or self.source is not None:
                    raise TransferError(FailureKind.TRANSFER, "an nvlink offer that was not asked for")
                try:
                    self.source = self._sources.use(found)
                except TransferError as error:
                    self._give_up(error)

    def advance(self) -> None:
        """Looks for the end of the mapping; never blocks."""
        if self.bases is not None or self.error is not None:
            return
        if self.source is None:
            if time.monotonic() > self._offer_until_s:
                self._give_up(TransferError(FailureKind.CONNECT, f"the source did not answer in {OFFER_TIMEOUT_S:g} s"))
        elif self.source.mapping.done():
            try:
                mapped = self.source.mapping.result()
                self.bases = [mapped.places(region) for region in self.pair.source]
            except TransferError as error:
                self._give_up(error)
            except Exception as error:
                log.exception("mapping a source's memory failed in an unforeseen way")
                self._give_up(TransferError(FailureKind.CONNECT, f"mapping the source's memory failed: {error!r}"))

    def refuse(self) -> NoReturn:
        """Raises what made this source unreadable."""
        assert self.error is not None, "only a source that cannot be read"
        raise TransferError(self.error.kind, str(self.error))

    def close(self) -> None:
        """What is under way goes on, and the mapping stays as long; nothing new starts."""
        self._give_up(TransferError(FailureKind.PEER_LOST, "the connection to the source has ended"))

    def _give_up(self, error: TransferError) -> None:
        self.error = self.error or error
        self.bases = None
        if self.source is not None:
            self._sources.give_back(self.source)
            self.source = None


class NvlinkReader:
    """A reader that has authenticated itself."""

    def __init__(self, exports: Exports, send: Send) -> None:
        self._exports = exports
        self._send = send
        self._offer: Offer | None = None

    def receive(self, message: bytes) -> None:
        messages.to_source(message)
        if self._offer is None:
            try:
                self._offer = self._exports.offer()
            except PDServeError as error:
                log.warning("the KV pool cannot be opened to a reader over nvlink: %s", error)
                self._send(messages.encode(Declined(str(error))))
                return
        self._send(messages.encode(self._offer))

    def close(self) -> None:
        if self._offer is not None:
            self._exports.withdraw(self._offer)
            self._offer = None
