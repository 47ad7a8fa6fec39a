"""KV blocks over NVLink: the reader maps the source's pool and copies out of it with its own device.

Built and used by the transfer thread alone. The source only opens its pool (``export``) and takes no part in a pull;
the reader maps it (``sources``, ``mapping``: beside the transfer thread) and hands rows to its
:class:`pd_serve.transfer.movers.base.Mover`, all pulls of a turn in one call. Nothing here waits, but for ``close``.

A mapping is never taken away from under a copy. Whether what was copied may be used is not known here: a source that
has died or reused its blocks is read without an error.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pd_serve.errors import FailureKind, HandshakeError, PDServeError, TransferError
from pd_serve.memory.driver import VirtualMemoryDriver
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.net import boot_id
from pd_serve.transfer.base import BlockMap, Pair, Peer, Send
from pd_serve.transfer.merge import SORTED_FROM_BYTES, count_runs, neighbours_together
from pd_serve.transfer.movers.base import Mover, Rows
from pd_serve.transfer.nvlink import messages
from pd_serve.transfer.nvlink.export import Exports
from pd_serve.transfer.nvlink.ipc import CudaIpc, IpcDriver
from pd_serve.transfer.nvlink.mapping import Opener
from pd_serve.transfer.nvlink.messages import Description, Kind
from pd_serve.transfer.nvlink.peer import NvlinkPeer, NvlinkReader
from pd_serve.transfer.nvlink.pulls import Batch, NvlinkPull, Part
from pd_serve.transfer.nvlink.sources import Sources

log = logging.getLogger(__name__)

LONG_BYTES = 1 << 20  # copy engines take blocks from here on one by one as fast as runs of them
POLL_S = 0.5e-3  # while something ends beside this thread
CLOSE_TIMEOUT_S = 1.0


class NvlinkTransport:
    """See :class:`pd_serve.transfer.base.Transport`. The mover stays its owner's, who closes it after the transport."""

    name = "nvlink"

    def __init__(
        self, driver: VirtualMemoryDriver, mover: Mover, socket_dir: Path, ipc: IpcDriver | None = None
    ) -> None:
        """``socket_dir``: see :func:`pd_serve.transfer.nvlink.socket_directory`. ``ipc``: CudaIpc when it is needed."""
        self._driver = driver
        self._mover = mover
        self._socket_dir = socket_dir
        self._ipc = ipc
        self._waiting: list[NvlinkPull] = []

    def register(self, memory: PoolMemory) -> None:
        if memory.device is None and not memory.segments:
            raise TransferError(FailureKind.TRANSFER, "nvlink moves GPU memory and this pool is the host's; use nixl")
        self._memory = memory
        self._device = memory.device or 0
        self._exports = Exports(self._driver, self._ipc_driver, memory, self._socket_dir)
        self._opener = Opener(self._driver, self._ipc_driver, self._device, self._socket_dir)
        self._sources = Sources(self._opener)
        self._description = Description(self._exports.kind, boot_id(), self._exports.why_not)

    def describe(self) -> bytes:
        return messages.encode(self._description)

    def connect(self, source: bytes, pair: Pair, send: Send) -> NvlinkPeer:
        theirs = messages.description(source)
        if theirs.kind is Kind.NONE:
            raise TransferError(FailureKind.CONNECT, f"the source cannot be read: {theirs.why_not}")
        messages.check_same_machine(self._description, theirs)
        _check_pair(pair, self._memory.regions)
        return NvlinkPeer(self._sources, theirs.kind, pair, send)

    def serve(self, reader: bytes, pair: Pair, send: Send) -> NvlinkReader:
        if self._exports.kind is Kind.NONE:
            raise TransferError(FailureKind.CONNECT, self._exports.why_not)
        messages.check_same_machine(messages.description(reader), self._description)
        return NvlinkReader(self._exports, send)

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> NvlinkPull:
        assert isinstance(peer, NvlinkPeer)
        if peer.error is not None:
            peer.refuse()
        parts, num_descriptors = [], 0
        for item in blocks:
            part, descriptors = _part(peer.pair, item)
            if descriptors:
                parts.append(part)
                num_descriptors += descriptors
        pull = NvlinkPull(peer, parts, num_descriptors, self._flush)
        if parts:
            self._waiting.append(pull)
        return pull

    def progress(self) -> float:
        self._flush()
        self._sources.progress()
        return POLL_S if self._waiting or self._sources.leaving else math.inf

    def close(self) -> bool:
        """Withdraws the pool from readers that have not mapped it yet, ends pulls and unmaps every source."""
        if not hasattr(self, "_sources"):
            return True
        self._opener.stop.set()
        self._exports.close()
        for pull in self._waiting:
            pull.fail(TransferError(FailureKind.TRANSFER, "the transport was closed"))
        self._waiting = []
        self._sources.give_back_all()
        until_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._sources.leaving and time.monotonic() < until_s:
            time.sleep(POLL_S)
            self._sources.progress()
        if self._sources.leaving:
            log.warning("%d sources could not be unmapped in time; they are with this process", len(self._sources))
            _keep_until_exit.append(self)
            return False
        return True

    def _flush(self) -> None:
        """Starts all pulls whose source is mapped, in one call."""
        started: list[NvlinkPull] = []
        waiting: list[NvlinkPull] = []
        items = []
        for pull in self._waiting:
            if not pull.waiting:
                continue  # closed meanwhile
            pull.peer.advance()
            if pull.peer.error is not None:
                pull.fail(pull.peer.error)
            elif pull.peer.bases is None:
                waiting.append(pull)
            else:
                items += pull.items(pull.peer.bases)
                started.append(pull)
        self._waiting = waiting
        if started:
            self._start(started, items)

    def _start(self, pulls: list[NvlinkPull], items: list[tuple[Rows, Rows]]) -> None:
        try:
            batch = Batch(self._mover.copy(items))
        except Exception as error:
            if not isinstance(error, PDServeError):
                log.exception("a fault in the mover")
            for pull in pulls:
                pull.fail(TransferError(FailureKind.TRANSFER, f"the copy could not be started: {error}"))
            # a part of it may be on its way; only after this can blocks and mappings be given back
            self._driver.synchronize(self._device)
            return
        for pull in pulls:
            pull.start(batch)
        for source in {pull.peer.source for pull in pulls}:
            assert source is not None, "a peer that has bases has a source"
            source.read_by(batch)

    def _ipc_driver(self) -> IpcDriver:
        if self._ipc is None:
            self._ipc = CudaIpc()
        return self._ipc


_keep_until_exit: list[NvlinkTransport] = []


def _part(pair: Pair, item: BlockMap) -> tuple[Part, int]:
    """The rows of one group and how many copies they are at least. Raises TransferError."""
    slicing, source, reader = pair.check(item), pair.source[item.group], pair.reader[item.group]
    remote, local = item.remote, item.local
    if slicing.whole and SORTED_FROM_BYTES <= slicing.row_bytes < LONG_BYTES:
        remote, local = neighbours_together(remote, local)
        descriptors = count_runs(remote, local)
    else:
        descriptors = len(remote) * len(slicing.source.rows)
    return Part(item.group, slicing.source_rows(source, remote), slicing.reader_rows(reader, local)), descriptors


def _check_pair(pair: Pair, ours: tuple[Region, ...]) -> None:
    """What a device is told to read and write must lie in the two pools. Raises HandshakeError."""
    if not len(pair.slicings) == len(pair.source) == len(pair.reader) or not set(pair.reader) <= set(ours):
        raise HandshakeError(f"a pair of {len(pair.slicings)} slicings does not fit {len(ours)} regions of this pool")
    for group, (slicing, *regions) in enumerate(zip(pair.slicings, pair.source, pair.reader, strict=True)):
        for side, region in zip((slicing.source, slicing.reader), regions, strict=True):
            rows = side.rows if len(region.places) == 1 else side.rows - np.array(region.places)
            last = (side.pieces_per_block - 1) * side.step_bytes + int(np.max(rows, initial=0)) + slicing.row_bytes
            fits = slicing.row_bytes > 0 and int(np.min(rows, initial=0)) >= 0 and last <= side.block_bytes
            if not fits or side.block_bytes != region.block_bytes or len(side.rows) != len(slicing.source.rows):
                raise HandshakeError(
                    f"blocks of group {group} have {region.block_bytes} bytes, which does not fit the layout's "
                    f"{side.block_bytes}; start both nodes with the same model"
                )
