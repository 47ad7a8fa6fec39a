"""The Transport over UCX messages: one UCX worker, its sessions as reader and as source, when to look at them again.

Built and used by the transfer thread alone. While nothing is under way UCX is not asked at all: a source learns of work
by a control message over the peer channel, which wakes the thread.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
import zlib
from collections.abc import Sequence

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory.region import PoolMemory
from pd_serve.net import boot_id
from pd_serve.transfer.base import BlockMap, Pair, Peer, Send
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.ucx import messages as wire
from pd_serve.transfer.ucx.binding import Operation, Ucx, Worker
from pd_serve.transfer.ucx.reader import UcxPeer, UcxPull
from pd_serve.transfer.ucx.shared import DEVICE, HOST, Shared
from pd_serve.transfer.ucx.source import UcxReader
from pd_serve.transfer.ucx.staging import Staging

log = logging.getLogger(__name__)

PROGRESS_BUDGET_S = 1e-3  # in one turn: sockets are served in between
LOOK_MIN_S, LOOK_MAX_S = 20e-6, 5e-3  # between turns: the longer nothing moved, the longer
DROPS_PER_TURN = 64
DROPPED_BYTES = 8  # of a message that nobody wants: UCX takes the rest off the sender and throws it away
CLOSE_TURNS = 200


class UcxTransport:
    """See :class:`pd_serve.transfer.base.Transport`. ``mover`` is for the pool's memory and stays the caller's.

    For GPU memory the thread's current CUDA context must be the pool's before this is built.
    """

    name = "ucx"

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._limits = HOST if mover.device is None else DEVICE
        self._ucx = Ucx()
        self._worker = Worker(self._ucx, on_device=mover.device is not None)
        self._shared: Shared | None = None
        self._readers: list[UcxReader] = []
        self._peers: dict[int, UcxPeer] = {}  # by session
        self._scratch = np.zeros(DROPPED_BYTES, dtype=np.uint8)
        self._dropped: list[Operation] = []
        self._moved_s = 0.0

    def register(self, memory: PoolMemory) -> None:
        if memory.device != self._mover.device:
            raise TransferError(
                FailureKind.TRANSFER, f"the pool is on device {memory.device}, its mover on {self._mover.device}"
            )
        # UCX registers memory when it is first used, and keeps the registration
        largest_piece = max((region.whole_bytes for region in memory.regions), default=0)
        staging = Staging(self._mover, max(self._limits.message_bytes, largest_piece), 4 * self._limits.slots)
        self._shared = Shared(self._worker, self._mover, memory, staging, self._limits, boot_id())

    @property
    def shared(self) -> Shared:
        """After ``register``."""
        assert self._shared is not None, "no memory was registered"
        return self._shared

    def describe(self) -> bytes:
        address, limits = self._worker.address, self._limits
        return wire.encode(
            wire.Description(
                wire.VERSION, address, zlib.crc32(address), limits.message_bytes, limits.window, self.shared.machine
            )
        )

    def connect(self, source: bytes, pair: Pair, send: Send) -> UcxPeer:
        theirs = wire.description(source)
        session = 0
        while session == 0 or session in self._peers:
            session = secrets.randbits(32)
        peer = self._peers[session] = UcxPeer(self.shared, theirs, pair, session, send, self.progress)
        self._moved_s = time.monotonic()
        return peer

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> UcxPull:
        assert isinstance(peer, UcxPeer)
        self._moved_s = time.monotonic()
        return peer.pull(blocks)

    def serve(self, reader: bytes, pair: Pair, send: Send) -> UcxReader:
        served = UcxReader(self.shared, wire.description(reader), pair, send)
        self._readers.append(served)
        return served

    def progress(self) -> float:
        busy: list[UcxPeer | UcxReader] = [session for session in self._sessions() if session.busy]
        if not busy and not self._dropped:
            self._forget()
            return math.inf
        moved = self._worker.progress(PROGRESS_BUDGET_S)
        moved |= self._drop_unwanted()
        for session in busy:
            moved |= session.advance()
        self._forget()
        now_s = time.monotonic()
        if moved:
            self._moved_s = now_s
        return min(max((now_s - self._moved_s) / 4, LOOK_MIN_S), LOOK_MAX_S)

    def _sessions(self) -> list[UcxPeer | UcxReader]:
        return [*self._peers.values(), *self._readers]

    def _drop_unwanted(self) -> bool:
        """Receives are posted before they are asked for: what arrives without one was given up, or is nobody's."""
        self._dropped = [operation for operation in self._dropped if not operation.ended()]
        for _ in range(DROPS_PER_TURN):
            tag = self._worker.unexpected()
            if tag is None:
                return False
            peer = self._peers.get(tag >> 32)
            if peer is not None:
                peer.unclaimed(tag & 0xFFFFFFFF)
            operation = self._worker.receive(self._scratch.ctypes.data, DROPPED_BYTES, tag, on_device=False)
            self._dropped.append(operation)
        return True

    def _forget(self) -> None:
        self._readers = [reader for reader in self._readers if not reader.ended]
        self._peers = {session: peer for session, peer in self._peers.items() if not peer.ended}

    def close(self) -> bool:
        for session in self._sessions():
            session.close()
        for _ in range(CLOSE_TURNS):
            if self.progress() == math.inf:
                break
        if self._sessions() or self._dropped:
            # taking the worker down now would wait for them
            log.warning("%d UCX sessions have not ended; they end with this process", len(self._sessions()))
            _keep_until_exit.append(self)
            return False
        return True


_keep_until_exit: list[UcxTransport] = []
