"""The decode end of a session: asks for messages, receives them, unpacks what was packed.

Used by :class:`pd_serve.transfer.ucx.transport.UcxTransport` alone. A receive is posted before its message is asked
for, so that it lands where it belongs and UCX buffers nothing. Memory is given back only when UCX says that the receive
has ended: a cancelled one at once, one whose bytes are moving when they have arrived or the endpoint was closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import BlockMap, Outcome, Pair, PullState, Send
from pd_serve.transfer.movers.base import Work
from pd_serve.transfer.packing.copies import unpack
from pd_serve.transfer.packing.pieces import encode
from pd_serve.transfer.ucx import messages as wire
from pd_serve.transfer.ucx.binding import Endpoint, Operation
from pd_serve.transfer.ucx.plan import messages, span
from pd_serve.transfer.ucx.shared import Shared


class Arrival:
    """A message that was asked for. ``holds``: local blocks of its pull may be written to."""

    def __init__(self, pull: UcxPull, message: BlockMap, slot: int | None, operation: Operation) -> None:
        self.pull = pull
        self.message = message
        self.slot = slot
        self.operation: Operation | None = operation
        self.work: Work | None = None
        self.wanted = True
        self.holds = True
        self.thrown_away = False  # its message came after the receive was cancelled

    @property
    def moving(self) -> bool:
        """UCX or the mover uses its memory."""
        return self.operation is not None or self.work is not None


class UcxPull(Outcome):
    """One transfer. See :class:`pd_serve.transfer.base.Pull`."""

    work = None

    def __init__(self, peer: UcxPeer, waiting: list[BlockMap], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.num_descriptors = len(waiting)
        self.waiting = deque(waiting)
        self.held = 0  # arrivals that may write to local blocks
        self._peer = peer

    def poll(self) -> PullState:
        if self.state is PullState.RUNNING:
            self._peer.turn()
        return self.state

    def fail(self, error: TransferError) -> None:
        super().fail(error)
        self.waiting.clear()

    def close(self) -> bool:
        if self.state is PullState.RUNNING:
            self._peer.abandon(self)
        if self.held:
            self._peer.turn()
        return self.held == 0


class UcxPeer:
    """A source, as its reader sees it. ``turn`` lets the transport make progress."""

    def __init__(
        self, shared: Shared, theirs: wire.Description, pair: Pair, session: int, send: Send, turn: Callable[[], object]
    ) -> None:
        self.session = session
        self.turn = turn
        self.broken: TransferError | None = None
        self._shared = shared
        self._theirs = theirs
        self._pair = pair
        self._send = send
        self._message_bytes = min(shared.limits.message_bytes, theirs.message_bytes)
        self._window = min(shared.limits.window, theirs.window)
        self._endpoint: Endpoint | None = None
        self._pulls: deque[UcxPull] = deque()  # with messages to ask for
        self._arrivals: dict[int, Arrival] = {}  # by number
        self._slots = 0
        self._only_staged = shared.only_staged(theirs.machine)
        self._number = wire.HELLO
        # When both ends connect at the same moment, UCX 1.21 loses every second TCP connection. So the source connects
        # and says hello; the endpoint made after that is the other end of the same connection.
        self._greeting = np.zeros(wire.HELLO_BYTES, dtype=np.uint8)
        self._hello: Operation | None = shared.worker.receive(
            self._greeting.ctypes.data, wire.HELLO_BYTES, self._tag(wire.HELLO), on_device=False
        )
        send(wire.encode(wire.Open(session)))

    def _tag(self, number: int) -> int:
        return self.session << 32 | number

    @property
    def busy(self) -> bool:
        """UCX has to make progress for it."""
        return self._hello is not None or bool(self._arrivals) or bool(self._pulls)

    @property
    def ended(self) -> bool:
        """Nothing of it is left."""
        return self.broken is not None and not self.busy

    def pull(self, blocks: Sequence[BlockMap]) -> UcxPull:
        if self.broken is not None:
            raise self.broken
        waiting: list[BlockMap] = []
        size_bytes = 0
        for item in blocks:
            slicing = self._pair.check(item)
            waiting += messages(item, slicing, self._message_bytes, self._shared.limits.direct_bytes)
            size_bytes += slicing.piece_bytes * len(item.remote)
        pull = UcxPull(self, waiting, size_bytes)
        if waiting:
            self._pulls.append(pull)
            self._ask()
        else:
            pull.state = PullState.DONE
        return pull

    def receive(self, message: bytes) -> None:
        gone = wire.from_source(message)
        self.fail(TransferError(FailureKind.PEER_LOST, f"the prefill node stopped sending: {gone.reason}"))

    def advance(self) -> bool:
        """Looks at what UCX and the mover have done, and asks for more; whether there was anything."""
        if self._hello is not None and self._hello.ended():
            self._greeted(self._hello.error())
        if self._endpoint is not None and not self._endpoint.alive:
            self.fail(TransferError(FailureKind.PEER_LOST, "the prefill node's UCX endpoint is gone"))
        before = len(self._arrivals)
        for number, arrival in list(self._arrivals.items()):
            if arrival.moving:
                self._step(number, arrival)
        after = len(self._arrivals)
        self._ask()
        return after != before or len(self._arrivals) != after

    def _greeted(self, error: str | None) -> None:
        self._hello = None
        if self.broken is not None:
            return
        if error is not None:
            self.fail(TransferError(FailureKind.CONNECT, f"UCX cannot connect to the prefill node: {error}"))
            return
        try:
            self._endpoint = self._shared.worker.connect(self._theirs.address)
        except TransferError as failed:
            self.fail(failed)

    def _ask(self) -> None:
        """Posts receives and asks for their messages, as many as fit."""
        if self._endpoint is None or self.broken is not None:
            return
        wants: list[wire.Want] = []
        while self._pulls and len(self._arrivals) < self._window:
            pull = self._pulls[0]
            if pull.waiting:
                number = self._post(pull, pull.waiting[0])
                if number is None:
                    break
                message = pull.waiting.popleft()
                wants.append(wire.Want(number, message.group, encode(message.remote)))
            if not pull.waiting:
                self._pulls.popleft()
        if wants and self.broken is None:
            self._send(wire.encode(wire.Wants(wants)))

    def _post(self, pull: UcxPull, message: BlockMap) -> int | None:
        shared, slicing = self._shared, self._pair.slicings[message.group]
        address = slot = None
        if not self._only_staged:
            address = span(slicing.reader, slicing, self._pair.reader[message.group], message.local)
        if address is None:
            slot = shared.staging.take() if self._slots < shared.limits.slots else None
            if slot is None:
                return None
            self._slots += 1
            address = slot
        number = self._number % (2**32 - 1) + 1
        try:
            size_bytes = slicing.piece_bytes * len(message.local)
            operation = shared.worker.receive(address, size_bytes, self._tag(number), on_device=shared.on_device)
        except TransferError as error:
            self._give(slot)
            self.fail(error)
            return None
        self._number = number
        self._arrivals[number] = Arrival(pull, message, slot, operation)
        pull.held += 1
        return number

    def _step(self, number: int, arrival: Arrival) -> None:
        try:
            if arrival.operation is not None and arrival.operation.ended():
                error, arrival.operation = arrival.operation.error(), None
                if error is not None:
                    self._ended(number, arrival, arrived=False)
                    if arrival.wanted:
                        self.fail(self._what_ended_it(error))
                    return
                if arrival.slot is not None and arrival.wanted:
                    copy = unpack(self._pair, arrival.message.group, arrival.message.local, arrival.slot)
                    arrival.work = self._shared.mover.copy([copy])
            if arrival.work is not None and arrival.work.done():
                arrival.work = None
        except TransferError as failed:  # of the mover
            arrival.work = None
            self._ended(number, arrival, arrived=False)
            self.fail(failed)
            return
        if not arrival.moving:
            self._ended(number, arrival, arrived=True)

    def _what_ended_it(self, error: str) -> TransferError:
        if self._endpoint is not None and not self._endpoint.alive:
            return TransferError(FailureKind.PEER_LOST, f"the prefill node's UCX endpoint is gone ({error})")
        return TransferError(FailureKind.TRANSFER, f"UCX could not receive: {error}")

    def _ended(self, number: int, arrival: Arrival, *, arrived: bool) -> None:
        self._give(arrival.slot)
        arrival.slot = None
        self._let_go(arrival)
        if arrived or arrival.wanted or arrival.thrown_away or self.broken is not None:
            self._arrivals.pop(number, None)
        # else it was cancelled, and the source still counts it: it stays until its message turns up
        pull = arrival.pull
        if arrived and arrival.wanted and pull.held == 0 and not pull.waiting and pull.state is PullState.RUNNING:
            pull.state = PullState.DONE

    def _let_go(self, arrival: Arrival) -> None:
        if arrival.holds:
            arrival.holds = False
            arrival.pull.held -= 1

    def _give(self, slot: int | None) -> None:
        if slot is not None:
            self._slots -= 1
            self._shared.staging.give(slot)

    def unclaimed(self, number: int) -> None:
        """The message of a cancelled receive has turned up (and is thrown away)."""
        arrival = self._arrivals.get(number)
        if arrival is not None:
            arrival.thrown_away = True
            if not arrival.moving:
                del self._arrivals[number]

    def abandon(self, pull: UcxPull) -> None:
        """Nobody wants the rest of this pull."""
        pull.fail(TransferError(FailureKind.CANCELLED, "the pull was given up"))
        self._cancel([arrival for arrival in self._arrivals.values() if arrival.pull is pull])

    def _cancel(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            arrival.wanted = False
            if arrival.operation is not None:
                arrival.operation.cancel()
                if arrival.slot is not None:
                    self._let_go(arrival)  # what may still come ends up in staging

    def fail(self, error: TransferError) -> None:
        """Nothing more comes: ends all pulls and the connection."""
        if self.broken is not None:
            return
        self.broken = error
        for pull in [*self._pulls, *(arrival.pull for arrival in self._arrivals.values())]:
            pull.fail(error)
        self._pulls.clear()
        if self._hello is not None:
            self._hello.cancel()
        self._cancel(list(self._arrivals.values()))
        self._arrivals = {number: arrival for number, arrival in self._arrivals.items() if arrival.moving}
        if self._endpoint is not None:
            self._endpoint.close()

    def close(self) -> None:
        self.fail(TransferError(FailureKind.PEER_LOST, "the session with the prefill node has ended"))
