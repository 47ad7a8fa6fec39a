"""The source's side: its pool, opened to readers that have authenticated themselves, and closed again.

Owned by the transport, on the transfer thread. Nothing is exported, and no socket listens, before the first reader
asks: a decode node never opens its memory. An exported descriptor keeps physical memory alive, so all of them end
with ``close``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from pd_serve.errors import FailureKind, PDServeError, TransferError
from pd_serve.memory.driver import HandleType, VirtualMemoryDriver
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.nvlink.fd_server import FdServer
from pd_serve.transfer.nvlink.ipc import IpcDriver
from pd_serve.transfer.nvlink.messages import MAX_SEGMENTS, Kind, Offer, Range


def kind_of(memory: PoolMemory) -> tuple[Kind, str]:
    """How this pool can be handed over; with NONE, why it cannot."""
    types = {segment.handle_type for segment in memory.segments}
    if not types:
        return Kind.IPC, ""
    if len(memory.segments) > MAX_SEGMENTS:
        return Kind.NONE, f"the source's pool has {len(memory.segments)} segments, more than {MAX_SEGMENTS}"
    if types == {HandleType.POSIX_FD}:
        return Kind.POSIX_FD, ""
    if types == {HandleType.FABRIC}:
        return Kind.FABRIC, ""
    return Kind.NONE, "the source's memory cannot be exported (no handle type works there; see `pd-serve doctor`)"


class Exports:
    """What readers may open."""

    def __init__(
        self, driver: VirtualMemoryDriver, ipc: Callable[[], IpcDriver], memory: PoolMemory, socket_dir: Path
    ) -> None:
        self._driver = driver
        self._ipc = ipc
        self._memory = memory
        self._socket_dir = socket_dir
        self._source = secrets.token_bytes(16)
        self._ranges: list[Range] = []
        self._fds: list[int] = []
        self._server: FdServer | None = None
        self._closed = False
        self.kind, self.why_not = kind_of(memory)

    def offer(self) -> Offer:
        """Opens the pool, with a token of its own. Raises TransferError, DriverError."""
        if self.kind is Kind.NONE or self._closed:
            raise TransferError(FailureKind.CONNECT, self.why_not or "the source has withdrawn its memory")
        if not self._ranges:
            self._ranges = self._export()
        if self.kind is not Kind.POSIX_FD:
            return Offer(self._source, self.kind, self._ranges)
        if self._server is None:
            self._server = FdServer(self._socket_dir)
        token = self._server.grant(self._fds)
        return Offer(self._source, self.kind, self._ranges, os.fspath(self._server.path), token)

    def withdraw(self, offer: Offer) -> None:
        """Its token is worth nothing any more. What a reader has mapped stays mapped until it unmaps it."""
        if self._server is not None and offer.token:
            self._server.revoke(offer.token)

    def close(self) -> None:
        """For good: nothing can be opened any more."""
        self._closed = True
        if self._server is not None:
            self._server.close()
            self._server = None
        self._close_fds()
        self._ranges = []

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _export(self) -> list[Range]:
        segments = self._memory.segments
        if self.kind is Kind.IPC:
            return self._export_ipc()
        if self.kind is Kind.FABRIC:
            return [Range(s.address, s.size_bytes, self._driver.export_fabric(s.handle)) for s in segments]
        try:
            for segment in segments:
                self._fds.append(self._driver.export_fd(segment.handle))
        except PDServeError:
            self._close_fds()
            raise
        return [Range(s.address, s.size_bytes) for s in segments]

    def _export_ipc(self) -> list[Range]:
        assert self._memory.device is not None, "refused by register"
        ipc, found = self._ipc(), {}
        for address, _ in (place for region in self._memory.regions for place in region.ranges):
            allocation = ipc.export(self._memory.device, address)
            found[allocation.address] = Range(allocation.address, allocation.size_bytes, allocation.handle)
        return list(found.values())
