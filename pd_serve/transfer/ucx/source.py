"""The prefill end of a session: sends the pieces that its reader asks for, from the pool or packed into staging.

Used by :class:`pd_serve.transfer.ucx.transport.UcxTransport` alone. What a reader may ask for at a time is bounded, and
it is checked here: a reader cannot make the source pack or queue more than its window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pair, Send
from pd_serve.transfer.movers.base import I64, Work
from pd_serve.transfer.packing.copies import pack
from pd_serve.transfer.packing.pieces import decode
from pd_serve.transfer.ucx import messages as wire
from pd_serve.transfer.ucx.binding import Endpoint, Operation
from pd_serve.transfer.ucx.plan import span
from pd_serve.transfer.ucx.shared import Shared


@dataclass
class Sending:
    """A message on its way: packed by ``work``, then sent by ``operation``."""

    number: int
    group: int
    pieces: I64
    size_bytes: int
    slot: int | None = None
    work: Work | None = None
    operation: Operation | None = None


class UcxReader:
    """A reader, as the source sees it."""

    def __init__(self, shared: Shared, theirs: wire.Description, pair: Pair, send: Send) -> None:
        self._shared = shared
        self._theirs = theirs
        self._pair = pair
        self._send = send
        self._session = 0
        self._endpoint: Endpoint | None = None
        self._greeting = np.zeros(wire.HELLO_BYTES, dtype=np.uint8)
        self._hello: Operation | None = None
        self._queue: deque[Sending] = deque()
        self._sending: list[Sending] = []
        self._slots = 0
        self._only_staged = shared.only_staged(theirs.machine)
        self._over = False

    @property
    def busy(self) -> bool:
        return self._hello is not None or bool(self._queue) or bool(self._sending)

    @property
    def ended(self) -> bool:
        return self._over and not self.busy

    def receive(self, message: bytes) -> None:
        asked = wire.from_reader(message)
        if self._over:
            return
        if isinstance(asked, wire.Open):
            if self._session:
                raise TransferError(FailureKind.TRANSFER, "the reader opens its UCX session twice")
            self._open(asked.session)
            return
        if not self._session:
            raise TransferError(FailureKind.TRANSFER, "the reader asks for pieces before it opened its UCX session")
        # twice: a message that has arrived may still be on its way here
        if len(self._queue) + len(self._sending) + len(asked.wants) > 2 * self._shared.limits.window:
            raise TransferError(FailureKind.TRANSFER, "the reader asks for more messages than its window")
        self._queue.extend([self._checked(want) for want in asked.wants])

    def _open(self, session: int) -> None:
        self._session = session
        try:
            self._endpoint = self._shared.worker.connect(self._theirs.address)
            self._hello = self._endpoint.send(
                self._greeting.ctypes.data, wire.HELLO_BYTES, self._tag(wire.HELLO), on_device=False
            )
        except TransferError as error:
            self._fail(str(error))

    def _tag(self, number: int) -> int:
        return self._session << 32 | number

    def _checked(self, want: wire.Want) -> Sending:
        pieces = decode(want.pieces, want.group, self._pair)
        size_bytes = len(pieces) * self._pair.slicings[want.group].piece_bytes
        if len(pieces) > 1 and size_bytes > self._shared.limits.message_bytes:
            raise TransferError(FailureKind.TRANSFER, f"the reader asks for a message of {size_bytes} bytes")
        return Sending(want.number, want.group, pieces, size_bytes)

    def advance(self) -> bool:
        """Packs, sends and gives back what was sent; whether there was anything."""
        before = len(self._queue), len(self._sending)
        if self._hello is not None and self._hello.ended():
            self._hello = None
        try:
            if not self._over:
                self._start()
            self._sending = [sending for sending in self._sending if not self._sent(sending)]
        except TransferError as error:
            self._fail(str(error))
        if self.busy and self._endpoint is not None and not self._endpoint.alive:
            self._fail("the UCX endpoint of the decode node is gone")
        return before != (len(self._queue), len(self._sending))

    def _start(self) -> None:
        shared = self._shared
        while self._queue:
            sending = self._queue[0]
            slicing, region = self._pair.slicings[sending.group], self._pair.source[sending.group]
            address = None if self._only_staged else span(slicing.source, slicing, region, sending.pieces)
            if address is not None:
                sending.operation = self._post(sending, address)
                self._sending.append(self._queue.popleft())
            else:
                slot = shared.staging.take() if self._slots < shared.limits.slots else None
                if slot is None:
                    return
                self._slots += 1
                sending.slot = slot
                self._sending.append(self._queue.popleft())
                sending.work = shared.mover.copy([pack(self._pair, sending.group, sending.pieces, slot)])

    def _post(self, sending: Sending, address: int) -> Operation:
        assert self._endpoint is not None, "opened before anything is asked for"
        tag = self._tag(sending.number)
        return self._endpoint.send(address, sending.size_bytes, tag, on_device=self._shared.on_device)

    def _sent(self, sending: Sending) -> bool:
        """Whether its memory is free again."""
        if sending.work is not None:
            try:
                if not sending.work.done():
                    return False
                if not self._over:
                    assert sending.slot is not None, "only staging is packed into"
                    sending.operation = self._post(sending, sending.slot)
            except TransferError as failed:
                self._fail(str(failed))
            sending.work = None
        if sending.operation is not None:
            if not sending.operation.ended():
                return False
            error, sending.operation = sending.operation.error(), None
            if error is not None and not self._over:
                self._fail(f"UCX could not send: {error}")
        if sending.slot is not None:
            self._slots -= 1
            self._shared.staging.give(sending.slot)
            sending.slot = None
        return True

    def _fail(self, reason: str) -> None:
        if not self._over:
            self._send(wire.encode(wire.Gone(reason)))
            self.close()

    def close(self) -> None:
        """By force: what is under way ends, whatever the reader does."""
        self._over = True
        self._queue.clear()
        if self._endpoint is not None:
            self._endpoint.close()
