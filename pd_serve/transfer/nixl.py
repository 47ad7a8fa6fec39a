"""KV blocks over NIXL: reads of a peer's pool by the UCX backend (RDMA, shared memory, TCP).

Built and used by the transfer thread alone. A pull names blocks by index in descriptor lists that are
prepared once a peer, and NIXL merges neighbouring indices itself; :mod:`pd_serve.transfer.merge` orders
them so that it finds as many as there are. This module never waits: every call returns at once, and
what is under way is asked for with ``poll``.

Three facts about NIXL 1.5.1 shape it:

- A reader needs the target's UCX to make progress while the two connect, and for the whole transfer
  where UCX has to fall back to TCP. The target's threads may be busy computing, so NIXL's own progress
  thread is on. Its Python agent hard-codes a delay of 0, with which that thread spins; the bindings
  below take a delay, and the thread then sleeps until a descriptor is readable.
- Releasing a request that is under way, or forgetting its peer, frees the handle but does not stop the
  bytes: they still arrive. So a running pull is never released; its blocks are held until it has ended.
- A peer that died is an error of the next call; a peer that is stopped (SIGSTOP) answers nothing for as
  long as it is stopped, and then goes on where it was.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.memory.region import Region
from pd_serve.transfer.base import BlockMap, Peer, PullState
from pd_serve.transfer.merge import count_runs, neighbours_together
from pd_serve.wire.peer import FailureKind

log = logging.getLogger(__name__)

# The progress thread is woken by events; the delay only bounds how long a wake-up that UCX missed can
# go unnoticed. Idle cost of 100 ms: 0.05% of a core (1 ms: 2%, 0, the Python agent's value: 100%).
PROGRESS_DELAY_US = 100_000

# An endpoint that failed is torn down by the progress thread, a moment after the error is reported.
QUARANTINE_S = 0.1

SCRATCH_BYTES = 4096

# Settings of UCX that a user may override in the environment.
UCX_DEFAULTS = {
    "UCX_LOG_FILE": "stderr",  # its default, stdout, belongs to the commands' own output
    "UCX_LOG_LEVEL": "error",
    # To watch for unmapped memory UCX rewrites libc's brk, sbrk and mmap while other threads run in them: an engine
    # that loads its model meanwhile crashed in one of thirty starts. The pool is registered once and never unmapped.
    "UCX_MEM_EVENTS": "n",
}


Address = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Endpoint(msgspec.Struct):
    """What ``describe`` sends, in MessagePack."""

    agent: str
    metadata: bytes  # NIXL's own
    regions: list[tuple[Address, Count, Count]]  # address, block_bytes, num_blocks of each group
    scratch: Address  # of SCRATCH_BYTES readable bytes


class NixlPull:
    """One transfer. See :class:`pd_serve.transfer.base.Pull`."""

    def __init__(self, transport: NixlTransport, handle: int, size_bytes: int, num_descriptors: int) -> None:
        self.size_bytes = size_bytes
        self.num_descriptors = num_descriptors
        self._transport = transport
        self._handle: int | None = handle
        self._state = PullState.RUNNING
        self._error: TransferError | None = None
        self._failed_at_s = 0.0

    def post(self) -> None:
        self._ask(self._transport.agent.postXferReq)

    def poll(self) -> PullState:
        if self._state is PullState.RUNNING:
            self._ask(self._transport.agent.getXferStatus)
        return self._state

    def _ask(self, call: Callable[[int], Any]) -> None:
        nixl = self._transport.nixl
        assert self._handle is not None
        try:
            status = call(self._handle)
        except nixl.nixlRemoteDisconnectError:
            self._fail(FailureKind.PEER_LOST, "the prefill node's endpoint is gone (NIXL: remote disconnect)")
        except self._transport.errors as error:
            self._fail(FailureKind.TRANSFER, f"NIXL could not read: {error}")
        else:
            if status == nixl.NIXL_SUCCESS:
                self._state = PullState.DONE
            elif status != nixl.NIXL_IN_PROG:
                self._fail(FailureKind.TRANSFER, f"NIXL could not read: status {status}")

    def _fail(self, kind: FailureKind, message: str) -> None:
        self._state = PullState.FAILED
        self._error = TransferError(kind, message)
        self._failed_at_s = time.monotonic()

    def error(self) -> TransferError:
        assert self._error is not None, "only after FAILED"
        return self._error

    def close(self) -> bool:
        if self._handle is None:
            return True
        state = self.poll()
        if state is PullState.RUNNING:
            return False
        if state is PullState.FAILED and time.monotonic() < self._failed_at_s + QUARANTINE_S:
            return False
        self._transport.agent.releaseXferReq(self._handle)
        self._handle = None
        return True


class NixlPeer:
    """A remote agent and its prepared descriptor list. ``broken``: reads from it can only fail."""

    def __init__(self, transport: NixlTransport, agent: str, prepared: int, regions: list[Region]) -> None:
        self.agent = agent
        self.prepared = prepared
        self.regions = regions
        self.users = 0
        self.running: list[NixlPull] = []
        self.first: NixlPull | None = None
        self.broken = False
        self._transport = transport

    def close(self) -> None:
        """Gives the peer back; it is forgotten once nothing reads from it any more."""
        self.users -= 1
        self._transport.progress()

    def settle(self) -> bool:
        """Drops reads that have ended; True when none is left."""
        for pull in self.running:
            self.broken |= pull.poll() is PullState.FAILED
        self.running = [pull for pull in self.running if pull.poll() is PullState.RUNNING]
        if self.first is not None and self.first.close():
            self.first = None
        return not self.running


class NixlTransport:
    """See :class:`pd_serve.transfer.base.Transport`. ``agent_name`` must be new at every start (node and epoch)."""

    name = "nixl"

    def __init__(self, agent_name: str) -> None:
        self._agent_name = agent_name
        self.nixl = _load_bindings()
        self.errors = tuple(v for k, v in vars(self.nixl).items() if k.startswith("nixl") and k.endswith("Error"))
        config = self.nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_DELAY_US
        config.useListenThread = False
        try:
            self.agent = self.nixl.nixlAgent(agent_name, config)
            self._backend: int = self.agent.createBackend("UCX", {})
        except self.errors as error:
            raise TransferError(FailureKind.TRANSFER, f"NIXL cannot start its UCX backend: {error}") from error
        self._regions: list[Region] = []
        self._scratch = np.zeros(SCRATCH_BYTES, dtype=np.uint8)
        self._prepared: int | None = None
        self._peers: dict[str, NixlPeer] = {}

    def register(self, regions: Sequence[Region]) -> None:
        self._regions = list(regions)
        spans = [(r.address, r.size_bytes) for r in regions] + [(self._scratch.ctypes.data, SCRATCH_BYTES)]
        rows = np.array([(address, size, 0) for address, size in spans], dtype=np.uint64)
        try:
            self.agent.registerMem(self.nixl.nixlRegDList(self.nixl.DRAM_SEG, rows), [self._backend])
            self._prepared = self.agent.prepXferDlist(
                self._descriptors(self._regions, self._scratch.ctypes.data), [self._backend]
            )
        except self.errors as error:
            raise TransferError(
                FailureKind.TRANSFER,
                f"NIXL cannot register the KV pool ({error}); with RDMA, check the memlock limit (ulimit -l)",
            ) from error

    def describe(self) -> bytes:
        endpoint = Endpoint(
            agent=self._agent_name,
            metadata=bytes(self.agent.getLocalMD()),
            regions=[(r.address, r.block_bytes, r.num_blocks) for r in self._regions],
            scratch=self._scratch.ctypes.data,
        )
        return msgspec.msgpack.encode(endpoint)

    def connect(self, peer: bytes) -> NixlPeer:
        """Prepares reading and starts a first small read, so that the endpoints are wired before the first pull."""
        self.progress()
        try:
            endpoint = msgspec.msgpack.decode(peer, type=Endpoint)
        except msgspec.DecodeError as error:
            raise HandshakeError(f"the peer's transport description cannot be read: {error}") from error
        regions = [Region(*r) for r in endpoint.regions]
        ours, theirs = [r.block_bytes for r in self._regions], [r.block_bytes for r in regions]
        if ours != theirs:
            raise HandshakeError(f"block sizes differ: {ours} bytes here, {theirs} at the peer")
        known = self._peers.get(endpoint.agent)
        if known is None:
            known = self._peers[endpoint.agent] = self._load(endpoint, regions)
            self._wire_up(known)
        elif known.broken:
            raise TransferError(FailureKind.CONNECT, "reads from this peer's last connection have not ended yet")
        known.users += 1
        return known

    def _load(self, endpoint: Endpoint, regions: list[Region]) -> NixlPeer:
        try:
            self.agent.loadRemoteMD(endpoint.metadata)
        except self.errors as error:
            raise TransferError(FailureKind.CONNECT, f"NIXL cannot connect to {endpoint.agent}: {error}") from error
        try:
            descriptors = self._descriptors(regions, endpoint.scratch)
            prepared = self.agent.prepXferDlist(endpoint.agent, descriptors, [self._backend])
        except self.errors as error:
            self.agent.invalidateRemoteMD(endpoint.agent)
            raise TransferError(FailureKind.CONNECT, f"NIXL cannot read from {endpoint.agent}: {error}") from error
        return NixlPeer(self, endpoint.agent, prepared, regions)

    def _wire_up(self, peer: NixlPeer) -> None:
        last = np.array([sum(r.num_blocks for r in self._regions)], dtype=np.int32)
        remote_last = np.array([sum(r.num_blocks for r in peer.regions)], dtype=np.int32)
        peer.first = self._start(peer, remote_last, last, SCRATCH_BYTES, 1)

    def _descriptors(self, regions: Sequence[Region], scratch: int) -> Any:
        """All blocks of all groups, one row each, then the scratch memory: the index space of a pull."""
        rows = np.zeros((sum(r.num_blocks for r in regions) + 1, 3), dtype=np.uint64)
        at = 0
        for region in regions:
            span = rows[at : at + region.num_blocks]
            span[:, 0] = region.address + np.arange(region.num_blocks, dtype=np.uint64) * np.uint64(region.block_bytes)
            span[:, 1] = region.block_bytes
            at += region.num_blocks
        rows[at] = (scratch, SCRATCH_BYTES, 0)
        return self.nixl.nixlXferDList(self.nixl.DRAM_SEG, rows)

    def pull(self, peer: Peer, blocks: Sequence[BlockMap]) -> NixlPull:
        assert isinstance(peer, NixlPeer)
        peer.settle()
        if peer.broken:
            raise TransferError(FailureKind.PEER_LOST, "the prefill node's endpoint has failed")
        remote_base = np.cumsum([0] + [r.num_blocks for r in peer.regions])
        local_base = np.cumsum([0] + [r.num_blocks for r in self._regions])
        remote, local = [], []
        size_bytes = num_descriptors = 0
        for item in blocks:
            theirs, ours = neighbours_together(item.remote, item.local)
            _check_range(theirs, peer.regions[item.group], "the prefill node")
            _check_range(ours, self._regions[item.group], "this node")
            remote.append(theirs + remote_base[item.group])
            local.append(ours + local_base[item.group])
            size_bytes += len(ours) * self._regions[item.group].block_bytes
            num_descriptors += count_runs(theirs, ours)
        return self._start(
            peer,
            np.concatenate(remote).astype(np.int32),
            np.concatenate(local).astype(np.int32),
            size_bytes,
            num_descriptors,
        )

    def _start(
        self,
        peer: NixlPeer,
        remote: npt.NDArray[np.int32],
        local: npt.NDArray[np.int32],
        size_bytes: int,
        num_descriptors: int,
    ) -> NixlPull:
        try:
            handle = self.agent.makeXferReq(
                self.nixl.NIXL_READ, self._prepared, local, peer.prepared, remote, "", [self._backend], False
            )
        except self.errors as error:
            peer.broken = True
            raise TransferError(FailureKind.PEER_LOST, f"NIXL cannot read from {peer.agent}: {error}") from error
        pull = NixlPull(self, handle, size_bytes, num_descriptors)
        peer.running.append(pull)
        pull.post()
        return pull

    def progress(self) -> None:
        """Forgets peers that were given back, once no read from them is under way."""
        for peer in [p for p in self._peers.values() if p.users == 0]:
            if peer.settle():
                del self._peers[peer.agent]
                self.agent.releasedDlistH(peer.prepared)
                try:
                    self.agent.invalidateRemoteMD(peer.agent)
                except self.errors:
                    log.debug("NIXL had already dropped %s", peer.agent)  # it does so itself on a disconnect

    def close(self) -> None:
        self.progress()
        if self._peers:
            # a read is still under way: taking the agent down now could let it write into reused memory
            log.warning("%d peers still have reads under way; they end with this process", len(self._peers))
            _keep_until_exit.append(self)
            return
        if self._prepared is not None:
            self.agent.releasedDlistH(self._prepared)
            self._prepared = None
        del self.agent


_keep_until_exit: list[NixlTransport] = []


def _check_range(ids: npt.NDArray[np.int64], region: Region, whose: str) -> None:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= region.num_blocks):
        raise TransferError(
            FailureKind.TRANSFER, f"block {ids.min()}..{ids.max()} is outside of {whose}'s {region.num_blocks}"
        )


def _load_bindings() -> ModuleType:
    for key, value in UCX_DEFAULTS.items():
        os.environ.setdefault(key, value)
    try:
        # the meta package picks the build (CUDA 12, 13) that fits this machine; its `nixl_agent` class
        # is not used because it fixes the progress thread's delay
        from nixl import _bindings
    except ImportError as error:
        raise TransferError(
            FailureKind.TRANSFER, f"NIXL cannot be loaded ({error}); install the package `nixl` and a build of it"
        ) from error
    bindings: ModuleType = _bindings
    return bindings
