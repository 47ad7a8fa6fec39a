"""The sources that this reader has mapped: one mapping a source, shared by its sessions, kept while a copy reads it.

Owned by the transport, on the transfer thread; only mapping and unmapping run beside it: they would hold its pulls
up, and a silent source all other sources. A source that nobody refers to any more is *leaving*: it is unmapped as soon
as its mapping is complete and its last copy has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.nvlink.mapping import Mapped, Opener
from pd_serve.transfer.nvlink.messages import Offer

if TYPE_CHECKING:
    from pd_serve.transfer.nvlink.pulls import Batch

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SOURCES = 128  # mapped at once: each costs addresses, and its memory while it is dead and still mapped


class Source:
    """A pool that is mapped, or being mapped."""

    def __init__(self, offer: Offer, mapping: Future[Mapped]) -> None:
        self.offer = offer
        self.mapping = mapping
        self.users = 0
        self._batches: list[Batch] = []
        self._unmapping: Future[None] | None = None

    @property
    def failed(self) -> bool:
        return self.mapping.done() and self.mapping.exception() is not None

    def read_by(self, batch: Batch) -> None:
        self._batches = [b for b in self._batches if not b.ended()]
        self._batches.append(batch)

    def leave(self) -> bool:
        """Unmaps as soon as it may; True once nothing is mapped."""
        if self._unmapping is not None:
            return self._unmapping.done()
        self._batches = [b for b in self._batches if not b.ended()]
        if self._batches or not self.mapping.done():
            return False
        if self.failed:
            return True
        self._unmapping = _in_background(self.mapping.result().unmap, "pd-nvlink-unmap")
        return False


class Sources:
    """All of them."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._known: dict[bytes, Source] = {}
        self._leaving: list[Source] = []

    def __len__(self) -> int:
        return len(self._known) + len(self._leaving)

    @property
    def leaving(self) -> bool:
        return bool(self._leaving)

    def use(self, offer: Offer) -> Source:
        """The source that made this offer, mapped once. Raises TransferError. ``give_back`` once for each call."""
        source = self._known.get(offer.source)
        if source is None or source.failed:
            if len(self) >= MAX_SOURCES:
                raise TransferError(
                    FailureKind.CONNECT, f"{MAX_SOURCES} sources are mapped already; try again when one has left"
                )
            mapping = _in_background(lambda: self._opener.map_offer(offer), "pd-nvlink-map")
            source = self._known[offer.source] = Source(offer, mapping)
        elif (source.offer.kind, source.offer.ranges) != (offer.kind, offer.ranges):
            raise TransferError(FailureKind.CONNECT, "the source offered other memory than before under the same name")
        source.users += 1
        return source

    def give_back(self, source: Source) -> None:
        source.users -= 1
        if source.users == 0 and self._known.get(source.offer.source) is source:
            del self._known[source.offer.source]
            self._leaving.append(source)
            self.progress()

    def give_back_all(self) -> None:
        self._leaving += self._known.values()
        self._known = {}
        self.progress()

    def progress(self) -> None:
        self._leaving = [source for source in self._leaving if not source.leave()]


def _in_background(job: Callable[[], T], name: str) -> Future[T]:
    """Runs it on a thread of its own, a daemon: a driver that hangs does not keep the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
