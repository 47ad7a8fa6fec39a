"""What all sessions of one UcxTransport share, and how much of it one session may use."""

from __future__ import annotations

from dataclasses import dataclass

from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.ucx.binding import Worker
from pd_serve.transfer.ucx.staging import Staging


@dataclass(frozen=True)
class Limits:
    message_bytes: int  # a message is at most this long, or one piece
    direct_bytes: int  # from here on, a run is sent as it lies
    window: int  # messages of a session that are asked for and have not arrived
    slots: int  # staging of a session, in messages; all sessions together have four times as many


# Host memory: copies and messages are one core's work, so packing pays only for what is much shorter than a message.
HOST = Limits(message_bytes=1 << 20, direct_bytes=128 << 10, window=16, slots=8)
# A GPU packs at TB/s, and a message over cuda_ipc has to be long to be fast.
DEVICE = Limits(message_bytes=32 << 20, direct_bytes=8 << 20, window=16, slots=4)


@dataclass(frozen=True)
class Shared:
    worker: Worker
    mover: Mover
    memory: PoolMemory
    staging: Staging
    limits: Limits
    machine: str  # boot id

    def only_staged(self, machine: str) -> bool:
        """Whether UCX cannot open this pool to a peer on that machine; staging memory is never cumem memory."""
        return self.memory.closed_to_ucx and machine == self.machine

    @property
    def on_device(self) -> bool:
        return self.memory.device is not None
