"""The reader's half of packed pulls: asks for chunks, reads the slots they come in, and unpacks them.

A *packed pull* is cut into chunks when local staging slots are free. Each chunk: ask, be answered, read, unpack; its
source slot is given back as soon as it was read. The pull is done when every chunk is unpacked and its source has
confirmed that the slot held it all the time. Local slots go to the peers in turn, a chunk each; none is used again
while a read or a copy may touch it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pd_serve.errors import TransferError
from pd_serve.transfer.base import Pair, PullState, Send
from pd_serve.transfer.mover import I64, Mover, Rows, Work
from pd_serve.transfer.nixl import messages as m
from pd_serve.transfer.nixl.bindings import Agent
from pd_serve.transfer.nixl.limits import GROWTH, UNIT_BYTES, Limits
from pd_serve.transfer.nixl.reads import Read, Remote
from pd_serve.transfer.nixl.staging import PART_ALIGNMENT, Ring, lay_out, unit_ids, units
from pd_serve.transfer.poller import look_s
from pd_serve.wire.peer import FailureKind

MAX_UNITS = 1 << 17  # of a source's ring: 16 GiB


class Item(NamedTuple):
    """Pieces of a group, and where they go."""

    group: int
    remote: I64
    local: I64


@dataclass(eq=False)
class Chunk:
    pull: PackedPull
    ticket: int
    items: list[Item]
    size_bytes: int  # in its slot
    slot: int  # here
    read: Read | None = None
    copies: list[tuple[Rows, Rows]] = field(default_factory=list)  # how it is unpacked
    freed: bool = False  # the source's slot was given back
    work: Work | None = None


class PackedPull:
    """The packed part of a pull; ``size_bytes`` of payload."""

    def __init__(self, items: list[Item], size_bytes: int, first_chunk_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._chunk_bytes = first_chunk_bytes
        self._items = deque(items)
        self.state = PullState.RUNNING
        self.failure: TransferError | None = None
        self.unconfirmed = 0  # chunks whose source has not confirmed them
        self.chunks: set[Chunk] = set()  # that hold a local slot

    @property
    def wants(self) -> bool:
        """Chunks are left to ask for."""
        return bool(self._items) and self.state is PullState.RUNNING

    def cut(self, slot_bytes: int, piece_bytes: Sequence[int]) -> list[Item]:
        """The next chunk's pieces. A slot holds one piece at least."""
        room = max(min(self._chunk_bytes, slot_bytes), piece_bytes[self._items[0].group])
        self._chunk_bytes = min(self._chunk_bytes * GROWTH, slot_bytes)
        taken: list[Item] = []
        while self._items:
            item = self._items[0]
            size = piece_bytes[item.group]
            count = min(len(item.remote), room // size)
            if count <= 0:
                break
            room -= count * size + PART_ALIGNMENT
            taken.append(Item(item.group, item.remote[:count], item.local[:count]))
            if count < len(item.remote):
                self._items[0] = Item(item.group, item.remote[count:], item.local[count:])
                break
            self._items.popleft()
        return taken

    def settle(self) -> None:
        if self.state is PullState.RUNNING and not self._items and not self.chunks and not self.unconfirmed:
            self.state = PullState.DONE

    def fail(self, error: TransferError) -> None:
        if self.state is PullState.RUNNING:
            self.state = PullState.FAILED
            self.failure = error


class LocalRing:
    """This node's slots, handed to the peers that wait for one in turn."""

    def __init__(self, mover: Mover, agent: Agent, limits: Limits, largest_block_bytes: int) -> None:
        self.mover = mover
        self.agent = agent
        self.limits = limits
        self._largest_block_bytes = largest_block_bytes
        self._ring: Ring | None = None
        self._list: int | None = None
        self._waiting: deque[Unpacker] = deque()

    def open(self) -> None:
        """Raises TransferError where there is no memory for it."""
        if self._ring is None:
            ring = Ring(self.mover, self.agent, self.limits, self._largest_block_bytes)
            self._list = self.agent.prepare(units(ring.address, ring.slots * ring.slot_bytes), self.mover.device)
            self._ring = ring

    @property
    def ring(self) -> Ring:
        assert self._ring is not None, "not opened"
        return self._ring

    @property
    def descriptors(self) -> int:
        assert self._list is not None, "not opened"
        return self._list

    def wait(self, unpacker: Unpacker) -> None:
        if unpacker not in self._waiting:
            self._waiting.append(unpacker)

    def hand_out(self) -> None:
        asked: list[Unpacker] = []
        while self._waiting and self.ring.num_free:
            unpacker = self._waiting.popleft()
            if unpacker.wants:
                slot = self.ring.take()
                assert slot is not None
                unpacker.ask(slot)
                asked.append(unpacker)
                if len(asked) == 1:
                    unpacker.flush()  # nothing is under way before this was packed
                if unpacker.wants:
                    self._waiting.append(unpacker)
        for unpacker in asked:
            unpacker.flush()

    def close(self) -> None:
        if self._list is not None:
            self.agent.release_list(self._list)
            self._list = None


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
        self._pulls: deque[PackedPull] = deque()  # with chunks left to ask for
        self._asked: dict[int, Chunk] = {}  # until answered
        self._asked_s = 0.0  # the last of them
        self._freeing: dict[int, PackedPull] = {}  # until confirmed
        self._active: list[Chunk] = []  # being read or unpacked
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
        if self._opened is None or not self._pulls:
            return False
        return self._tickets_out < self._tickets_at_once

    def ask(self, slot: int) -> None:
        """For the next chunk, into this local slot. Only if ``wants``."""
        assert self._opened is not None
        pull = self._pulls[0]
        items = pull.cut(min(self._opened.slot_bytes, self._local.ring.slot_bytes), self._piece_bytes)
        parts = [(item.group, item.remote) for item in items]
        _, size = lay_out(self._pair.slicings, parts)
        chunk = Chunk(pull, next(self._tickets), items, size, slot)
        pull.chunks.add(chunk)
        pull.unconfirmed += 1
        self._tickets_out += 1
        self._asked[chunk.ticket] = chunk
        self._asked_s = self._clock()
        self._outgoing.append(m.Pack(chunk.ticket, m.parts_as_data(parts)))
        # the oldest pull first, but no pull waits for all of a long one
        self._pulls.rotate(-1)

    def advance(self) -> float:
        """Moves everything on; returns in how many seconds it wants to be called again."""
        active, self._active = self._active, []
        reading = False
        for chunk in active:
            if reading and chunk.read is not None:
                self._active.append(chunk)  # reads of one source end in their order: asking after all takes longer
                continue
            try:
                ended = self._look(chunk)
                reading |= chunk.read is not None
            except TransferError as error:
                self._give_up(chunk, error)
                continue
            if not ended:
                self._active.append(chunk)
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
        chunk.pull.settle()
        return True

    def _copies(self, chunk: Chunk) -> list[tuple[Rows, Rows]]:
        slicings, regions = self._pair.slicings, self._pair.reader
        offsets, _ = lay_out(slicings, [(item.group, item.remote) for item in chunk.items])
        at = self._local.ring.at(chunk.slot)
        return [
            (
                slicings[item.group].staged_rows(at + offset, len(item.local)),
                slicings[item.group].reader_rows(regions[item.group], item.local),
            )
            for item, offset in zip(chunk.items, offsets, strict=True)
        ]

    def _free(self, chunk: Chunk) -> None:
        """Gives the source its slot back."""
        chunk.freed = True
        self._outgoing.append(m.Free(chunk.ticket))
        self._freeing[chunk.ticket] = chunk.pull

    def _drop(self, chunk: Chunk) -> None:
        """Gives the local slot back."""
        chunk.pull.chunks.discard(chunk)
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
            chunk.pull.unconfirmed -= 1
            self._tickets_out -= 1
            self._drop(chunk)
            self._fail(
                chunk.pull, TransferError(FailureKind.TRANSFER, f"the prefill node cannot pack: {answer.reason}")
            )
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
        chunk.copies = self._copies(chunk)  # now, while the device is at it
        self._active.append(chunk)

    def _confirmed(self, freed: m.Freed) -> None:
        pull = self._freeing.pop(freed.ticket, None)
        if pull is None:
            raise TransferError(FailureKind.TRANSFER, f"the prefill node frees ticket {freed.ticket}, which is not out")
        pull.unconfirmed -= 1
        self._tickets_out -= 1
        if not freed.valid:
            self._fail(
                pull,
                TransferError(FailureKind.TRANSFER, "the prefill node used the staging slot again before it was read"),
            )
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
        pulls = {*self._pulls, *self._freeing.values()}
        pulls |= {chunk.pull for chunk in (*self._asked.values(), *self._active)}
        for pull in pulls:
            self._fail(pull, error)

    def _give_up(self, chunk: Chunk, error: TransferError) -> None:
        """A chunk that is in none of the lists any more has failed, and with it its pull."""
        self._leave(chunk)
        self._fail(chunk.pull, error)

    def end(self, pull: PackedPull) -> bool:
        """Stops a pull that is not done; True when nothing can write to its blocks any more."""
        if pull.state is PullState.RUNNING:
            pull.fail(TransferError(FailureKind.CANCELLED, "the pull was given up"))
        for ticket, chunk in list(self._asked.items()):
            if chunk.pull is pull:
                del self._asked[ticket]
                self._leave(chunk)
        for chunk in [c for c in self._active if c.pull is pull and c.work is None]:
            self._active.remove(chunk)
            self._leave(chunk)
        return not pull.chunks

    def _leave(self, chunk: Chunk) -> None:
        """Nobody wants the chunk any more; its slots come back when nothing touches them."""
        if not chunk.freed:
            self._free(chunk)
        if chunk.read is None:
            self._drop(chunk)
            return
        chunk.pull.chunks.discard(chunk)  # it is read into staging memory, not into blocks
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
