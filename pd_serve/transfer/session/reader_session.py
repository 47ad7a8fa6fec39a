"""One decode node's session at a prefill node: its lanes' readers, and the announcements that wait for their checksums.

Owned by the outbox, used on the transfer thread. It knows nothing of leases: the outbox says what is announced, and
drops what has ended meanwhile.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.transfer.base import Pair, Reader, Send
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.movers.base import I64, Sums
from pd_serve.transfer.slices import Slicing
from pd_serve.wire import peer as wire

log = logging.getLogger(__name__)


@dataclass
class _Announcement:
    ready: wire.Ready
    sums: list[Sums]  # one for each of its blocks


class Session:
    """``say``: sends a message to the decode node. ``sums``: whether announcements carry checksums."""

    def __init__(self, them: wire.Introduction, pair: Pair, lanes: Lanes, say: Callable[[wire.ToReader], None]) -> None:
        self.node_id = them.node_id
        self.epoch = them.epoch
        self.rank, self.ranks = them.rank, them.ranks
        self.sums = False
        self.lane = ""  # once chosen
        self.why_not: dict[str, str] = {}  # the decode node's other lanes
        self._described = them.lanes
        self._pair = pair
        self._lanes = lanes
        self._say = say
        self._readers: dict[str, Reader] = {}
        self._unsaid: list[wire.LaneMessage] | None = []  # until the Welcome went out
        self._announcements: deque[_Announcement] = deque()
        self._closed = False

    def is_replaced_by(self, them: wire.Introduction) -> bool:
        """They are this rank, connected anew, or a rank of its node after a restart."""
        return self.node_id == them.node_id and (self.rank == them.rank or self.epoch != them.epoch)

    # --- lanes

    def serve(self) -> dict[str, bytes]:
        """Prepares each lane that both have; returns their descriptions. Raises HandshakeError without any."""
        ours = self._lanes.transports
        described: dict[str, bytes] = {}
        for name, theirs in self._described.items():
            if name not in ours:
                self.why_not[name] = self._lanes.why_not.get(name, "the prefill node does not use it")
                continue
            try:
                self._readers[name] = ours[name].serve(theirs, self._pair, self._sender(name))
                described[name] = ours[name].describe()
            except TransferError as error:
                self.why_not[name] = f"the prefill node cannot serve it: {error}"
        if not described:
            self.close()
            why = "; ".join(f"{name}: {text}" for name, text in self.why_not.items())
            raise HandshakeError(
                f"no transport in common: the prefill node offers {', '.join(ours)}, the decode node can use "
                f"{', '.join(self._described) or 'none'}{f' ({why})' if why else ''}; set --transport auto on both"
            )
        return described

    def _sender(self, name: str) -> Send:
        def send(payload: bytes) -> None:
            message = wire.LaneMessage(name, payload)
            if self._unsaid is not None:
                self._unsaid.append(message)
            elif not self._closed:
                self._say(message)

        return send

    def welcomed(self) -> None:
        """The ``Welcome`` went out: what lanes had to say meanwhile follows."""
        unsaid, self._unsaid = self._unsaid, None
        for message in unsaid or ():
            self._say(message)

    def receive(self, message: wire.LaneMessage) -> None:
        """Raises TransferError for what makes no sense to the lane, which is then closed."""
        reader = self._readers.get(message.lane)
        if reader is None:  # closed when another was chosen, while this was on its way
            return
        try:
            reader.receive(message.payload)
        except TransferError:
            del self._readers[message.lane]
            reader.close()
            raise

    def choose(self, chosen: wire.Chosen) -> bool:
        """Closes the other lanes; False where the choice is none."""
        if self.lane or chosen.lane not in self._readers:
            return False
        self.lane = chosen.lane
        for name in [name for name in self._readers if name != self.lane]:
            self._readers.pop(name).close()
        rate = f"{chosen.bytes_per_s / 1e9:.2f} GB/s" if chosen.bytes_per_s > 0 else "not measured"
        others = {**self.why_not, **chosen.why_not}
        log.info(
            "decode node %s (epoch %s) reads over %s (%s)%s",
            self.node_id,
            self.epoch,
            self.lane,
            rate,
            "".join(f"; not {name}: {why}" for name, why in others.items()),
        )
        return True

    # --- announcements

    @property
    def announcing(self) -> bool:
        """Some wait for their checksums."""
        return bool(self._announcements)

    def announce(self, ready: wire.Ready) -> None:
        """Starts what has to be summed. Raises TransferError."""
        sums = [self._sum(blocks) for blocks in ready.blocks] if self.sums else []
        self._announcements.append(_Announcement(ready, sums))

    def next_ready(self) -> wire.Ready | None:
        """The oldest announcement, when all its checksums are there. Raises TransferError."""
        if not self._announcements or not all(sums.done() for sums in self._announcements[0].sums):
            return None
        announcement = self._announcements.popleft()
        ready = announcement.ready
        if announcement.sums:
            # what the book keeps has none: another session may need others
            blocks = [
                msgspec.structs.replace(b, checksums=sums.result().astype("<u8").tobytes())
                for b, sums in zip(ready.blocks, announcement.sums, strict=True)
            ]
            ready = msgspec.structs.replace(ready, blocks=blocks)
        return ready

    def summed_bytes(self, ready: wire.Ready) -> int:
        """How many bytes its checksums were made of."""
        return sum(len(b.checksums) // 8 * self._pair.slicings[b.group].piece_bytes for b in ready.blocks)

    def _sum(self, blocks: wire.Blocks) -> Sums:
        slicing = self._pair.slicings[blocks.group]
        pieces = pieces_of(np.frombuffer(blocks.ids, dtype="<i4").astype(np.int64), slicing)
        return self._lanes.mover.checksums(slicing.source_rows(self._pair.source[blocks.group], pieces))

    def close(self) -> None:
        self._closed = True
        while self._announcements:
            for sums in self._announcements.popleft().sums:
                self._lanes.abandon(sums)
        while self._readers:
            self._readers.popitem()[1].close()


def pieces_of(blocks: I64, slicing: Slicing) -> I64:
    """The source's pieces of these blocks, in order."""
    each = slicing.source.pieces_per_block
    if each == 1:
        return blocks
    pieces: I64 = (blocks[:, None] * each + np.arange(each, dtype=np.int64)).ravel()
    return pieces
