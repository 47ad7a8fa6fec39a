"""The ranks of an engine on one host: how they find each other, and how one notices that another has ended.

Made by each rank's process at start, on its main thread, once: torch has one default group a process. Ranks meet in a
directory that nobody else may enter (torch's FileStore and a Unix socket for each rank). Sums over ranks are in
:mod:`pd_serve.distributed.all_reduce`.

A collective whose partner is gone spins on the GPU for ever, in a CUDA graph with no time-out of NCCL's. So whoever
waits for the device waits with :meth:`Group.wait`, which looks at the other ranks' sockets meanwhile. After
:class:`RankLost` the process can only end, and by ``os._exit``: whatever frees memory of the device, also the end of
the interpreter, would wait for the kernel that spins.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from pd_serve.errors import PDServeError

# NVLink multicast needs what containers often lack, and then hangs or fails in mid-use; two-shot does without.
_NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
_LOOK_S = 0.01  # between looks at the other ranks' sockets
_NAP_S = 20e-6  # between looks at the device, which nobody waits for as long: the process has other threads
_RANK = struct.Struct("<i")
_SIZE = struct.Struct("<I")


class RankLost(PDServeError):
    """Another rank's process has ended, or did not come. This one has to end, too."""


class Awaited(Protocol):
    """torch.cuda.Event is one."""

    def query(self) -> bool: ...


class Group:
    """``directory``: private to the ranks of this engine and empty at first. Raises RankLost after ``timeout_s``."""

    def __init__(
        self, directory: Path, rank: int, size: int, device: torch.device, *, timeout_s: float = 120.0
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        self.rank, self.size, self.device = rank, size, device
        self._peers: dict[int, socket.socket] = {}
        self._looked_s = 0.0
        self._lost = False
        for name, value in _NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        try:
            self._meet(directory, time.monotonic() + timeout_s)
            for peer in self._peers.values():
                peer.settimeout(None)
            store = dist.FileStore(str(directory / "store"), size)  # type: ignore[attr-defined]
            cuda = device.type == "cuda"
            if cuda:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if cuda else None,
            )
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Torch's name of it."""
        return dist.group.WORLD.group_name  # type: ignore[union-attr]

    def check(self) -> None:
        """Raises RankLost where another rank has ended."""
        self._looked_s = time.monotonic()
        for rank, peer in self._peers.items():
            try:
                ended = not peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                ended = True
            if ended:
                raise self._ended(rank)

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """What each rank gave, a few kilobytes at most, when all have come here. Raises RankLost.

        What a rank wrote to memory that others see is there for them afterwards.
        """
        given = {self.rank: data}
        for rank, peer in self._peers.items():
            with self._noticing(rank):
                peer.sendall(_SIZE.pack(len(data)) + data)
        for rank, peer in self._peers.items():
            with self._noticing(rank):
                given[rank] = _receive(peer, *_SIZE.unpack(_receive(peer, _SIZE.size)))
        return [given[rank] for rank in range(self.size)]

    def least(self, number: int) -> int:
        """The least that any rank gave, when all have come here."""
        return min(int(given) for given in self.exchange(str(number).encode()))

    def share(self, descriptor: int) -> list[int]:
        """File descriptors that ranks open to each other, in the order of ranks; others' are the caller's to close."""
        given = {self.rank: descriptor}
        for rank, peer in self._peers.items():
            with self._noticing(rank):
                socket.send_fds(peer, [b"f"], [descriptor])
        for rank, peer in self._peers.items():
            with self._noticing(rank):
                _, (given[rank],), _, _ = socket.recv_fds(peer, 1, 1)
        return [given[rank] for rank in range(self.size)]

    @contextlib.contextmanager
    def _noticing(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: its end, in place of a descriptor
            raise self._ended(rank) from None

    def _ended(self, rank: int) -> RankLost:
        self._lost = True
        return RankLost(f"rank {rank} of {self.size} has ended: its log says why; this rank ends, too")

    def wait(self, event: Awaited) -> None:
        """Until the device has come to ``event``. Raises RankLost, within about 10 ms of another rank's end."""
        while not event.query():
            if time.monotonic() - self._looked_s > _LOOK_S:
                self.check()
            time.sleep(_NAP_S)

    def close(self) -> None:
        """Leaves the group. Where a rank was lost nothing is torn down on the device: the process is to end."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        if dist.is_initialized() and not self._lost:
            dist.destroy_process_group()

    def _meet(self, directory: Path, deadline_s: float) -> None:
        """A connection with each other rank: to the lower ones we connect, the higher ones come."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / f"rank-{self.rank}"))
            listener.listen(self.size)
            for rank in range(self.rank):
                self._peers[rank] = _connect(directory / f"rank-{rank}", rank, deadline_s)
                self._peers[rank].sendall(_RANK.pack(self.rank))
            while len(self._peers) < self.size - 1:
                listener.settimeout(max(0.001, deadline_s - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                    peer.settimeout(max(0.001, deadline_s - time.monotonic()))
                    (rank,) = _RANK.unpack(peer.recv(_RANK.size, socket.MSG_WAITALL))
                except (TimeoutError, struct.error):
                    missing = sorted(set(range(self.size)) - set(self._peers) - {self.rank})
                    raise RankLost(f"ranks {missing} of {self.size} did not start: their logs say why") from None
                self._peers[rank] = peer


def _receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def _connect(path: Path, rank: int, deadline_s: float) -> socket.socket:
    while True:
        peer = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            peer.connect(str(path))
            return peer
        peer.close()
        if time.monotonic() > deadline_s:
            raise RankLost(f"rank {rank} did not start: its log says why")
        time.sleep(0.02)
