"""A worker's half of the connector: it hands the scheduler's orders to the outbox and the inbox of its rank, and tells
vLLM what has ended.

Called by vLLM's worker, on its main thread, once a step. Bytes, leases and peers are the transfer thread's; but for
:meth:`WorkerSide.rest` nothing here waits for it.

What vLLM is told ends engines if it is wrong: a request is reported as sent once, if the scheduler side has said that
it is kept; and as received once for each that was to be fetched, whatever became of it, when nothing can write
to its blocks any more.
"""

from __future__ import annotations

import logging
import select
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pd_serve.decode.inbox import Arrived, Drained, Event, Failed, Inbox, Offered
from pd_serve.integrations.vllm.orders import Announcement, Fetch, Orders
from pd_serve.integrations.vllm.params import Held
from pd_serve.prefill.outbox import Outbox
from pd_serve.wire.peer import Blocks

log = logging.getLogger(__name__)

NO_TOKEN = -1  # the first token is in the prefill server's answer, not in the announcement of its blocks
MAX_ENDED = 4096
IDLE_WAIT_S = 3e-3  # what a short pull takes; a device has that much of a step before it still to do


@dataclass
class Results:
    """Of a step. ``failed``: of those received, which have not arrived; ``failed_blocks``: theirs."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


@dataclass
class _Fetching:
    fetch: Fetch | None  # None: of a prompt that nobody here wants, only its prefill server is told so
    begun_s: float
    until_s: float  # when it has to have begun
    offered_s: float = 0.0
    moving_s: float = 0.0  # for so long bytes came
    failure: str = ""
    dropped: bool = False


class WorkerSide:
    """``groups``: of each region of the rank's memory, the group of layers that it belongs to. ``offer_s``: how long
    a prefill server may take to say that it has a prompt."""

    def __init__(
        self,
        outbox: Outbox,
        inbox: Inbox,
        groups: tuple[int, ...],
        *,
        offer_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._inbox = inbox
        self._groups = groups
        self._offer_s = offer_s
        self._clock = clock
        self._kept: dict[str, str] = {}  # requests by key
        self._ended: OrderedDict[str, None] = OrderedDict()  # leases that ended before their request did
        self._fetching: dict[str, _Fetching] = {}  # by key
        self._keys: dict[str, str] = {}  # of requests that are fetched
        self._results = Results()

    # --- orders

    def withdraw(self, orders: Orders) -> None:
        """Before the step computes: what may be overwritten by it is nobody's to read any more."""
        for key, why in orders.cancelled:
            self._outbox.cancel(key, why)
            self._ended.pop(key, None)
        for request_id in orders.dropped:
            fetched = self._keys.get(request_id)
            if fetched is not None and not self._fetching[fetched].dropped:
                self._fetching[fetched].dropped = True
                self._inbox.cancel(fetched)

    def begin(self, orders: Orders) -> None:
        """What is to be kept and fetched from now on. Blocks to fetch into are set aside: nobody writes to them."""
        for key in orders.opened:
            self._outbox.open(key)
        for key, request_id in orders.kept.items():
            if key in self._ended:
                del self._ended[key]
                self._results.sent.add(request_id)
            else:
                self._kept[key] = request_id
        for held in orders.declined:
            self._decline(held)
        for fetch in orders.fetched:
            key = fetch.held.key
            self._fetching[key] = self._begun(fetch)
            self._keys[fetch.request_id] = key
            tables = [np.array(table, dtype=np.int32) for table in fetch.tables]
            place = [tables[group] for group in self._groups], [fetch.first] * len(self._groups)
            self._inbox.expect(key, fetch.held.source, place)

    def _begun(self, fetch: Fetch | None) -> _Fetching:
        now_s = self._clock()
        return _Fetching(fetch, now_s, now_s + self._offer_s)

    def _decline(self, held: Held) -> None:
        """Fetches nothing of it: its prefill server hears that it is not needed any more."""
        nothing = np.zeros(0, dtype=np.int32)
        self._fetching[held.key] = self._begun(None)
        self._inbox.expect(held.key, held.source, ([nothing] * len(self._groups), [1 << 30] * len(self._groups)))

    def announce(self, orders: Orders, computed: Callable[[], bool] | None) -> None:
        """After the step was launched. ``computed``: whether it has ended; None: it has."""
        for announcement in orders.announced:
            blocks = self._blocks(announcement)
            first = NO_TOKEN if announcement.last else None
            self._outbox.publish(announcement.key, announcement.num_tokens, blocks, first, computed)

    def _blocks(self, announcement: Announcement) -> list[Blocks]:
        by_group = {group: (first, np.array(ids, dtype="<i4").tobytes()) for group, first, ids in announcement.blocks}
        return [Blocks(region, *by_group[g]) for region, g in enumerate(self._groups) if g in by_group]

    # --- what has ended

    def rest(self, *, computes: bool) -> None:
        """Waits for prompts: what vLLM is told with one step it acts on in the next but one.

        After a step that computes nothing, until one has arrived: vLLM would sleep for a millisecond. A step that
        ``computes`` has been launched, mostly while its device is still at the step before: waiting is free then, but
        only what was just begun is waited for, and only if all that is on its way can come in that time."""
        begun = self._just_begun if computes else []
        if computes and self._takes_s() > IDLE_WAIT_S:
            return
        until_s = time.monotonic() + IDLE_WAIT_S
        while any(key in self._fetching for key in begun) or (
            not computes and self._wanted and not self._results.received
        ):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            poller = select.poll()
            poller.register(self._inbox.fileno(), select.POLLIN)
            poller.poll(left_s * 1e3)
            self._look()

    @property
    def _wanted(self) -> list[Fetch]:
        return [one.fetch for one in self._fetching.values() if one.fetch is not None and not one.dropped]

    @property
    def _just_begun(self) -> list[str]:
        since_s = self._clock() - IDLE_WAIT_S
        return [key for key, one in self._fetching.items() if one.fetch is not None and one.begun_s > since_s]

    def _takes_s(self) -> float:
        """All that is on its way, at the rates that lanes had in their self-tests; infinite where one is not known."""
        lanes = self._inbox.lanes()
        return sum(fetch.num_tokens / lanes.get(fetch.held.node_id, 1e-9) for fetch in self._wanted)

    def results(self) -> Results:
        """Since the last call. Raises TransferError where the transfer thread has given up."""
        self._look()
        results, self._results = self._results, Results()
        return results

    def _look(self) -> None:
        for ended in self._outbox.events():
            request_id = self._kept.pop(ended.key, None)
            if request_id is not None:
                self._results.sent.add(request_id)
            else:
                self._ended[ended.key] = None
                if len(self._ended) > MAX_ENDED:
                    self._ended.popitem(last=False)
            if ended.why not in ("released", "declined"):
                log.warning("the blocks of %s are not kept any more: %s", ended.key, ended.why)
        for event in self._inbox.events():
            fetching = self._fetching.get(event.key)
            if fetching is not None:
                self._heard(event, fetching)
        for key, fetching in self._fetching.items():
            if self._clock() >= fetching.until_s and not fetching.dropped:
                fetching.dropped, fetching.until_s = True, float("inf")
                fetching.failure = f"the prefill server did not say within {self._offer_s:g} s that it has the prompt"
                self._inbox.cancel(key)

    def _heard(self, event: Event, fetching: _Fetching) -> None:
        match event:
            case Offered():
                fetching.offered_s, fetching.until_s = self._clock(), float("inf")
            case Arrived():
                fetching.moving_s = event.seconds
                if fetching.fetch is not None and event.num_tokens != fetching.fetch.held.num_tokens:
                    # a client's word: vLLM would cache what is not there for whoever asks the same
                    said = fetching.fetch.held.num_tokens
                    fetching.failure = f"the prefill server kept {event.num_tokens} tokens, its params say {said}"
                elif any(event.whole_from):  # vLLM would take such blocks for whole ones
                    fetching.failure = "the prefill server holds less of a window than this one needs"
                self._received(event.key, fetching)
            case Failed():
                fetching.failure = f"{event.kind}: {event.message}"
            case Drained():
                self._received(event.key, fetching)

    def _received(self, key: str, fetching: _Fetching) -> None:
        fetch = fetching.fetch
        del self._fetching[key]
        if fetch is None:
            return
        del self._keys[fetch.request_id]
        if fetching.dropped and fetching.until_s < float("inf"):  # before its prefill server had heard of it
            self._decline(fetch.held)
        self._results.received.add(fetch.request_id)
        log.debug(
            "%s: announced %.1f ms after it was asked for, here after %.1f ms; bytes moved for %.1f ms",
            fetch.request_id,
            (fetching.offered_s - fetching.begun_s) * 1e3,
            (self._clock() - fetching.begun_s) * 1e3,
            fetching.moving_s * 1e3,
        )
        if fetching.failure:
            self._results.failed.add(fetch.request_id)
            self._results.failed_blocks.update(id for table in fetch.tables for id in table[fetch.first :] if id)
            log.error(
                "the prompt of %s was not fetched from %s: %s", fetch.request_id, fetch.held.node_id, fetching.failure
            )
