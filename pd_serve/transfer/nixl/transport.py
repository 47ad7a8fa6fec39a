"""The NIXL lane of a node. See :class:`pd_serve.transfer.base.Transport`, and the package for how it works."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.net import boot_id
from pd_serve.transfer.base import BlockMap, Pair, Peer, Send
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.nixl import messages
from pd_serve.transfer.nixl.bindings import Agent
from pd_serve.transfer.nixl.direct import LocalLists
from pd_serve.transfer.nixl.limits import Limits, limits_of
from pd_serve.transfer.nixl.local_ring import LocalRing
from pd_serve.transfer.nixl.packer import NixlReader, Packer
from pd_serve.transfer.nixl.peer import NixlPeer, NixlPull
from pd_serve.transfer.nixl.reads import Remote
from pd_serve.transfer.poller import SPIN_S
from pd_serve.transfer.slices import Side

log = logging.getLogger(__name__)

NEVER = 1 << 62  # bytes a descriptor, from which on pieces are read directly
LOOK_CLOSED_S = 10e-3  # at what closed peers still read
PROGRESS_S = 0.1  # an agent without a progress thread, while nothing is read


class NixlTransport:
    """``agent_name`` must be new at every start (node and epoch). The mover stays its owner's, and open until close.

    ``reads_only``: this node is never read. ``limits``: others than those measured for the mover's kind of memory.
    """

    name = "nixl"

    def __init__(
        self,
        agent_name: str,
        mover: Mover,
        backend: str = "UCX",
        options: Mapping[str, str] | None = None,
        *,
        reads_only: bool = False,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mover = mover
        self._limits = limits or limits_of(mover.device)
        self._clock = clock
        # Where GPUs move the bytes a reader needs no progress thread, and is faster without: before it sleeps, that
        # thread puts a host function on the stream of the reads under way, and the next read waits until the CPU has
        # answered it (UCX 1.23, uct_cuda_base_iface_event_fd_arm).
        threaded = mover.device is None or not reads_only
        self._agent = Agent(agent_name, backend, options or {}, progress_thread=threaded)
        self._lists = LocalLists(self._agent, mover.device)
        self._remotes: dict[str, Remote] = {}
        self._peers: list[NixlPeer] = []
        self._memory: PoolMemory | None = None

    def register(self, memory: PoolMemory) -> None:
        if memory.device != self._mover.device:
            raise TransferError(
                FailureKind.TRANSFER, f"a pool on device {memory.device} and a mover on {self._mover.device}"
            )
        self._agent.register([place for region in memory.regions for place in region.ranges], memory.device)
        self._memory = memory
        largest = max((r.whole_bytes for r in memory.regions[:-1]), default=0)
        self._packer = Packer(self._mover, self._agent, self._limits, largest, self._clock)
        self._ring = LocalRing(self._mover, self._agent, self._limits, largest)

    def describe(self) -> bytes:
        assert self._memory is not None, "only after register"
        closed_on = boot_id() if self._memory.closed_to_ucx else ""
        endpoint = messages.Endpoint(self._agent.name, self._agent.metadata(), self._mover.device, closed_on)
        return messages.encode(endpoint)

    # --- reader

    def connect(self, source: bytes, pair: Pair, send: Send) -> NixlPeer:
        """The endpoints are wired by the first read, the self-test's, not here: that takes some milliseconds."""
        self.progress()
        endpoint = _endpoint(source)
        _check(pair)
        remote = self._remotes.get(endpoint.agent)
        if remote is None:
            remote = self._remotes[endpoint.agent] = Remote(self._agent, endpoint.agent, endpoint.metadata)
        elif remote.broken:
            raise TransferError(FailureKind.CONNECT, "reads from this peer's last connection have not ended yet")
        else:
            remote.load(endpoint.metadata)
        limits = self._limits
        if endpoint.closed_on and endpoint.closed_on == boot_id():
            limits = dataclasses.replace(limits, direct_bytes=NEVER, direct_descriptors=0)
        peer = NixlPeer(self._agent, remote, self._lists, self._ring, pair, endpoint.device, limits, send, self._clock)
        self._peers.append(peer)
        return peer

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> NixlPull:
        assert isinstance(peer, NixlPeer)
        return peer.pull(blocks)

    # --- source

    def serve(self, reader: bytes, pair: Pair, send: Send) -> NixlReader:
        """NIXL's reads are one-sided: of the reader only its packed pulls are seen."""
        _endpoint(reader)
        _check(pair)
        return self._packer.serve(pair, send)

    # --- both

    def progress(self) -> float:
        """Packs, reads, unpacks; forgets closed peers once nothing is read from them."""
        if self._memory is None:
            return math.inf
        delay_s = self._packer.progress()
        peers, self._peers = self._peers, []
        for peer in peers:
            if not peer.closed:
                delay_s = min(delay_s, peer.unpacker.advance())
                self._peers.append(peer)
            elif not peer.settle():
                delay_s = min(delay_s, LOOK_CLOSED_S)
                self._peers.append(peer)
        for name, remote in list(self._remotes.items()):
            if not remote.drop_ended():
                delay_s = min(delay_s, LOOK_CLOSED_S)
            elif not remote.users:
                del self._remotes[name]
                remote.forget()
        if self._remotes and not self._agent.progress_thread and delay_s > SPIN_S:
            self._agent.progress()
            delay_s = min(delay_s, PROGRESS_S)
        return delay_s

    def close(self) -> bool:
        for peer in self._peers:
            peer.close()
        self.progress()
        if self._remotes:
            # a read is still under way: taking the agent down now could let it write into reused memory
            log.warning("%d peers still have reads under way; they end with this process", len(self._remotes))
            _keep_until_exit.append(self)
            return False
        if self._memory is not None:
            self._ring.close()
            self._memory = None
        self._agent.close()
        return True


_keep_until_exit: list[NixlTransport] = []


def _endpoint(description: bytes) -> messages.Endpoint:
    try:
        return messages.decode_endpoint(description)
    except TransferError as error:
        raise HandshakeError(f"the peer's description of its NIXL lane cannot be read: {error}") from error


def _check(pair: Pair) -> None:
    """Regions and slices come from another node, in part: they must be of each other."""
    for name, regions, sides in (
        ("prefill", pair.source, [s.source for s in pair.slicings]),
        ("decode", pair.reader, [s.reader for s in pair.slicings]),
    ):
        _check_side(name, regions, sides)


def _check_side(name: str, regions: Sequence[Region], sides: Sequence[Side]) -> None:
    stated, needed = [r.block_bytes for r in regions], [side.block_bytes for side in sides]
    if stated != needed:
        raise HandshakeError(
            f"the {name} node's pool has blocks of {stated} bytes, its layout of {needed}; "
            "run the same version on both nodes"
        )
    if any(r.num_blocks < 1 or r.address < 0 for r in regions):
        raise HandshakeError(f"the {name} node's pool is empty or has no address")
