"""The reader's half of packed pulls: asks for chunks, reads the slots they come in, and unpacks them.

*Packed pulls* are cut into chunks when local staging slots are free; small ones share a chunk. Each chunk: ask, be
answered, read, unpack; its source slot is given back as soon as it was read. A pull is done when every chunk of it is
unpacked and its source has confirmed that the slot held it all the time. Local slots go to the peers in turn, a chunk
each; none is used again while a read or a copy may touch it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pair, PullState, Send
from pd_serve.transfer.nixl import messages as m
from pd_serve.transfer.nixl.chunks import Chunk, PackedPull, can_fill, take
from pd_serve.transfer.nixl.limits import GROWTH, UNIT_BYTES
from pd_serve.transfer.nixl.local_ring import LocalRing
from pd_serve.transfer.nixl.reads import Remote
from pd_serve.transfer.nixl.staging import unit_ids, units
from pd_serve.transfer.packing.pieces import encode
from pd_serve.transfer.poller import look_s

MAX_UNITS = 1 << 17  # of a source's ring: 16 GiB
UNFILLED = 2  # chunks that are asked for though there is room in them for pulls to come


class Unpacker:
    """Packed pulls from one source."""

    def __init__(
        self,
        local: LocalRing,
        remote: Remote,
        pair: Pair,
        device: int | None,
        send: Send,
        clock: Callable[[], float],
    ) -> None:
        self._local = local
        self._clock = clock
        self._remote = remote
        self._pair = pair
        self._device = device  # of the source's memory
        self._send = send
        self._piece_bytes = [slicing.piece_bytes for slicing in pair.slicings]
        self._opening = False
        self._opened: m.Opened | None = None
        self._descriptors: int | None = None  # of the source's ring
        self._tickets = itertools.count()
        # a ticket is out until it was confirmed: that bounds what the source holds for this reader
        self._tickets_out = 0
        self._tickets_at_once = 0
        self._pulls: deque[PackedPull] = deque()  # with pieces left to ask for
        self._grown_bytes = 0  # of the chunk behind others
        self._asked: dict[int, Chunk] = {}  # until answered
        self._asked_s = 0.0  # the last of them
        self._freeing: dict[int, Chunk] = {}  # until confirmed
        self._active: dict[Chunk, None] = {}  # being read or unpacked, in the order in which reads began
        self._outgoing: list[m.ToSource] = []
        self._closed = False

    # --- pulls

    def start(self, pull: PackedPull) -> None:
        """Raises TransferError where there is no staging memory on this side."""
        self._local.open()
        if not self._opening:
            self._opening = True
            self._outgoing.append(m.Open())
        self._pulls.append(pull)
        self.advance()

    @property
    def wants(self) -> bool:
        """Could use a local slot now."""
        while self._pulls and not self._pulls[0].wants:
            self._pulls.popleft()
        if self._opened is None or not self._pulls or self._tickets_out >= self._tickets_at_once:
            return False
        return len(self._asked) < UNFILLED or can_fill(self._pulls, self._next_bytes(self._opened))

    def _next_bytes(self, opened: m.Opened) -> int:
        """Of the next chunk: little while nothing is under way, for nothing is read before it is packed."""
        size_bytes = self._grown_bytes if self._tickets_out else self._local.limits.first_chunk_bytes
        return min(size_bytes, opened.slot_bytes, self._local.ring.slot_bytes)

    def ask(self, slot: int) -> None:
        """For the next chunk, into this local slot. Only if ``wants``."""
        assert self._opened is not None
        size_bytes = self._next_bytes(self._opened)
        taken = take(self._pulls, size_bytes, self._piece_bytes)
        self._grown_bytes = size_bytes * GROWTH
        chunk = Chunk(next(self._tickets), slot, taken, self._pair)
        for pull in chunk.pulls:
            pull.chunks.add(chunk)
            pull.unconfirmed += 1
        self._tickets_out += 1
        self._asked[chunk.ticket] = chunk
        self._asked_s = self._clock()
        self._outgoing.append(m.Pack(chunk.ticket, [m.Part(group, encode(pieces)) for group, pieces in chunk.parts]))
        if self._pulls and self._pulls[0] in chunk.pulls:
            self._pulls.rotate(-1)  # the oldest pull first, but no pull waits for all of a long one

    def advance(self) -> float:
        """Moves everything on; returns in how many seconds it wants to be called again."""
        reading = False
        for chunk in list(self._active):
            if chunk not in self._active or (reading and chunk.read is not None):
                continue  # reads of one source end in their order: asking after all takes longer
            try:
                ended = self._look(chunk)
                reading |= chunk.read is not None
            except TransferError as error:
                self._give_up(chunk, error)
                continue
            if ended:
                self._active.pop(chunk, None)
        if self.wants:
            self._local.wait(self)
        self._local.hand_out()
        self.flush()
        local = self._local
        if self._active or (self._asked and self._clock() < self._asked_s + local.limits.awake_s):
            return look_s(local.mover.device)
        return math.inf

    def _look(self, chunk: Chunk) -> bool:
        """True when its local slot was given back. Raises TransferError."""
        if chunk.read is not None:
            state = chunk.read.poll()
            if state is PullState.RUNNING:
                return False
            if state is PullState.FAILED:
                raise chunk.read.error()
            chunk.read.close()
            chunk.read = None
            self._free(chunk)
            chunk.work = self._local.mover.copy(chunk.copies)
        assert chunk.work is not None
        if not chunk.work.done():
            return False
        chunk.work = None
        self._drop(chunk)
        for pull in chunk.pulls:
            pull.settle()
        return True

    def _prepare(self, chunk: Chunk) -> None:
        chunk.prepare(self._local.ring.at(chunk.slot))

    def _free(self, chunk: Chunk) -> None:
        """Gives the source its slot back."""
        chunk.freed = True
        self._outgoing.append(m.Free(chunk.ticket))
        self._freeing[chunk.ticket] = chunk

    def _drop(self, chunk: Chunk) -> None:
        """Gives the local slot back."""
        for pull in chunk.pulls:
            pull.chunks.discard(chunk)
        self._local.ring.give_back(chunk.slot)

    # --- messages

    def receive(self, message: bytes) -> None:
        """Raises TransferError for what makes no sense."""
        if self._closed:
            return
        for item in m.decode_to_reader(message):
            if isinstance(item, m.Packed | m.NotPacked):
                self._answered(item)
            elif isinstance(item, m.Freed):
                self._confirmed(item)
            elif isinstance(item, m.Opened):
                self._take_opened(item)
            else:
                self._fail_all(TransferError(FailureKind.TRANSFER, f"at the prefill node: {item.reason}"))
                self._opening = False
        self.advance()

    def _take_opened(self, opened: m.Opened) -> None:
        size = opened.slot_bytes * opened.slots
        if not self._opening or self._opened is not None:
            raise TransferError(FailureKind.TRANSFER, "the prefill node opens its staging ring unasked")
        if (
            opened.slot_bytes % UNIT_BYTES
            or size // UNIT_BYTES > MAX_UNITS
            or opened.slot_bytes < max(self._piece_bytes[:-1], default=0)
        ):
            raise TransferError(
                FailureKind.TRANSFER,
                f"the prefill node offers {opened.slots} staging slots of {opened.slot_bytes} bytes, which do not fit",
            )
        self._remote.load(opened.metadata)
        self._descriptors = self._local.agent.prepare(units(opened.address, size), self._device, self._remote.name)
        self._opened = opened
        self._tickets_at_once = min(opened.tickets, self._local.limits.slots_per_peer)

    def _answered(self, answer: m.Packed | m.NotPacked) -> None:
        chunk = self._asked.pop(answer.ticket, None)
        if chunk is None:
            if answer.ticket in self._freeing:
                return  # it was given up; the two messages crossed
            raise TransferError(
                FailureKind.TRANSFER, f"the prefill node answers ticket {answer.ticket}, which is not out"
            )
        if isinstance(answer, m.NotPacked):
            self._tickets_out -= 1
            self._drop(chunk)
            for pull in chunk.pulls:
                pull.unconfirmed -= 1
                self._fail(pull, TransferError(FailureKind.TRANSFER, f"the prefill node cannot pack: {answer.reason}"))
            return
        assert self._opened is not None
        assert self._descriptors is not None
        try:
            if answer.slot >= self._opened.slots:
                raise TransferError(FailureKind.TRANSFER, f"the prefill node has no staging slot {answer.slot}")
            chunk.read = self._remote.read(
                self._local.descriptors,
                unit_ids(chunk.slot, self._local.ring.slot_bytes, chunk.size_bytes),
                self._descriptors,
                unit_ids(answer.slot, self._opened.slot_bytes, chunk.size_bytes),
            )
        except TransferError as error:
            self._give_up(chunk, error)
            return
        self._active[chunk] = None
        self._prepare(chunk)  # now, while the device is at it

    def _confirmed(self, freed: m.Freed) -> None:
        chunk = self._freeing.pop(freed.ticket, None)
        if chunk is None:
            raise TransferError(FailureKind.TRANSFER, f"the prefill node frees ticket {freed.ticket}, which is not out")
        self._tickets_out -= 1
        for pull in chunk.pulls:
            pull.unconfirmed -= 1
            if not freed.valid:
                why = "the prefill node used the staging slot again before it was read"
                self._fail(pull, TransferError(FailureKind.TRANSFER, why))
            pull.settle()

    def flush(self) -> None:
        if self._outgoing and not self._closed:
            self._send(m.encode(self._outgoing))
        self._outgoing.clear()

    # --- ends

    def _fail(self, pull: PackedPull, error: TransferError) -> None:
        pull.fail(error)
        self.end(pull)

    def _fail_all(self, error: TransferError) -> None:
        chunks = (*self._asked.values(), *self._active, *self._freeing.values())
        for pull in {*self._pulls, *(pull for chunk in chunks for pull in chunk.pulls)}:
            self._fail(pull, error)

    def _give_up(self, chunk: Chunk, error: TransferError) -> None:
        """The chunk has failed, and with it every pull that waits for it."""
        self._leave(chunk)
        for pull in chunk.pulls:
            self._fail(pull, error)

    def end(self, pull: PackedPull) -> bool:
        """Stops a pull that is not done; True when nothing can write to its blocks any more."""
        if pull.state is PullState.RUNNING:
            pull.fail(TransferError(FailureKind.CANCELLED, "the pull was given up"))
        for chunk in list(pull.chunks):
            if chunk.work is None:  # else it is being unpacked
                chunk.withdraw(pull)
                pull.chunks.discard(chunk)
                if not chunk.waiting:
                    self._leave(chunk)
                elif chunk.copies:
                    self._prepare(chunk)
        return not pull.chunks

    def _leave(self, chunk: Chunk) -> None:
        """Nobody wants the chunk any more; its slots come back when nothing touches them."""
        self._asked.pop(chunk.ticket, None)
        self._active.pop(chunk, None)
        if not chunk.freed:
            self._free(chunk)
        if chunk.read is None:
            self._drop(chunk)
            return
        for pull in chunk.pulls:
            pull.chunks.discard(chunk)  # it is read into staging memory, not into blocks
        slot = chunk.slot
        self._remote.leave(chunk.read, lambda: self._local.ring.give_back(slot))
        chunk.read = None

    def close(self) -> None:
        """The session has ended."""
        self._fail_all(TransferError(FailureKind.PEER_LOST, "the session with the prefill node has ended"))
        self._freeing.clear()
        self._outgoing.clear()
        self._closed = True

    @property
    def idle(self) -> bool:
        """After ``close``: nothing is unpacked any more."""
        return not self._active

    def release(self) -> None:
        """After ``close``, once nothing is read from the source."""
        if self._descriptors is not None:
            self._local.agent.release_list(self._descriptors)
            self._descriptors = None
