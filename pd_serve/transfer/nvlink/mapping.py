"""A source's pool in the reader's address space: opened, mapped, and taken down again, whatever happens half way.

:meth:`Opener.map_offer` and :meth:`Mapped.unmap` run on threads of their own: they take 10 ms for 4 GiB, and the source
may take its time to answer. Allocations that are neighbours in the source's addresses become neighbours here, so that
a region keeps its shape when it lies in several.

Physical memory lives for as long as somebody has it mapped: reading a dead source's memory is no fault, only worth
nothing. It is the lease that says what may be used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind, VirtualMemoryDriver
from pd_serve.memory.region import Region
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.nvlink import fd_client
from pd_serve.transfer.nvlink.ipc import IpcDriver
from pd_serve.transfer.nvlink.messages import Kind, Offer, Range

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """``size_bytes`` of the source's addresses from ``source`` on are seen at ``here``."""

    source: int
    size_bytes: int
    here: int


class Mapped:
    """What an :class:`Opener` made. ``unmap`` once, when nothing reads from it any more."""

    def __init__(self, windows: list[Window], undo: ExitStack, lock: threading.Lock) -> None:
        self.windows = windows
        self._undo = undo
        self._lock = lock

    def places(self, region: Region) -> tuple[int, I64]:
        """Where the source's region is here: an address, and the distances of its places from there. Raises
        TransferError."""
        found = [self._address(*place) for place in region.ranges]
        return (first := min(found)), np.array(found, dtype=np.int64) - first

    def _address(self, at: int, size_bytes: int) -> int:
        for window in self.windows:
            offset = at - window.source
            if offset >= 0 and offset + size_bytes <= window.size_bytes:
                return window.here + offset
        raise _failed(f"the source's blocks at {at:#x} are not in the memory that it handed over")

    def unmap(self) -> None:
        with self._lock:
            self._undo.close()


@dataclass(frozen=True)
class Opener:
    """How this process opens offers: its driver, device and socket directory."""

    driver: VirtualMemoryDriver
    ipc: Callable[[], IpcDriver]
    device: int
    socket_dir: Path
    stop: threading.Event = field(default_factory=threading.Event)  # ends waits
    lock: threading.Lock = field(default_factory=threading.Lock)  # one job at a time uses the driver

    def map_offer(self, offer: Offer) -> Mapped:
        """Raises TransferError (CONNECT); then nothing is left of it."""
        fds: list[int] = []
        if offer.kind is Kind.POSIX_FD:
            fds = fd_client.fetch(offer.socket, self.socket_dir, offer.token, len(offer.ranges), self.stop)
        try:
            if fds:
                fd_client.check_sizes(fds, offer.ranges)
            with self.lock, ExitStack() as undo:
                windows = self._map_ipc(offer, undo) if offer.kind is Kind.IPC else self._map_cumem(offer, fds, undo)
                return Mapped(windows, undo.pop_all(), self.lock)
        except DriverError as error:
            raise _failed(f"device {self.device} cannot map the source's memory ({error}); {_hint(offer)}") from error
        finally:
            fd_client.close_all(fds)

    def _map_cumem(self, offer: Offer, fds: list[int], undo: ExitStack) -> list[Window]:
        handles = []
        for index, each in enumerate(offer.ranges):
            handle = self.driver.import_fd(fds[index]) if fds else self.driver.import_fabric(each.handle)
            undo.callback(_quietly, self.driver.release, handle)
            handles.append(handle)
        handle_type = HandleType.POSIX_FD if offer.kind is Kind.POSIX_FD else HandleType.FABRIC
        alignment = self.driver.granularity(MemoryKind(self.device, handle_type, rdma=False))
        windows = []
        for window_ranges in neighbours(offer.ranges):
            first, last = offer.ranges[window_ranges[0]], offer.ranges[window_ranges[-1]]
            size = last.address + last.size_bytes - first.address
            here = self.driver.reserve(size, alignment)
            undo.callback(_quietly, self.driver.free_address, here, size)
            for index in window_ranges:
                at = here + offer.ranges[index].address - first.address
                self.driver.map(at, offer.ranges[index].size_bytes, handles[index], self.device)
                undo.callback(_quietly, self.driver.unmap, at, offer.ranges[index].size_bytes)
            windows.append(Window(first.address, size, here))
        return windows

    def _map_ipc(self, offer: Offer, undo: ExitStack) -> list[Window]:
        ipc = self.ipc()
        windows = []
        for each in offer.ranges:
            here = ipc.open(self.device, each.handle)
            undo.callback(_quietly, ipc.close, self.device, here)
            windows.append(Window(each.address, each.size_bytes, here))
        return windows


def neighbours(ranges: list[Range]) -> list[list[int]]:
    """Indices of ranges by address, those that touch in one list. Raises TransferError where ranges overlap."""
    runs: list[list[int]] = []
    end = -1
    for index in sorted(range(len(ranges)), key=lambda i: ranges[i].address):
        if ranges[index].address < end:
            raise _failed("the source offered the same memory twice")
        if ranges[index].address == end:
            runs[-1].append(index)
        else:
            runs.append([index])
        end = ranges[index].address + ranges[index].size_bytes
    return runs


def _quietly(call: Callable[..., None], *args: int) -> None:
    """A step of taking down: the others must be taken all the same."""
    try:
        call(*args)
    except DriverError as error:
        log.warning("memory of a peer cannot be given back: %s", error)


def _hint(offer: Offer) -> str:
    if offer.kind is Kind.FABRIC:
        return "fabric memory needs both machines in one MNNVL domain with an IMEX channel each"
    if offer.kind is Kind.IPC:
        return "cudaIpc needs peer access and one PID namespace; the source's --enable-cumem-allocator only the former"
    return "the two GPUs need peer access (nvidia-smi topo -p2p r)"


def _failed(message: str) -> TransferError:
    return TransferError(FailureKind.CONNECT, message)
