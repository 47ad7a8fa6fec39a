"""NIXL's bindings behind a dozen typed verbs, and what UCX is told at start.

Used by this package alone. An agent belongs to one thread. Every error of NIXL leaves here as a TransferError, but for
those of a read under way, which :mod:`pd_serve.transfer.nixl.reads` tells apart.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.errors import FailureKind, TransferError

I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]

# The progress thread is woken by events; the delay only bounds how long a wake-up that UCX missed can
# go unnoticed. Idle cost of 100 ms: 0.05% of a core (1 ms: 2%, 0, the Python agent's value: 100%).
PROGRESS_DELAY_US = 100_000

# Settings of UCX that a user may override in the environment.
UCX_DEFAULTS = {
    "UCX_LOG_FILE": "stderr",  # its default, stdout, belongs to the commands' own output
    "UCX_LOG_LEVEL": "error",
    # To watch for unmapped memory UCX rewrites libc's brk, sbrk and mmap, and the CUDA driver's allocation functions,
    # while other threads run in them: an engine that loads its model meanwhile crashed in one of thirty starts. Nothing
    # here needs the watch: what NIXL registers stays mapped until it is deregistered.
    "UCX_MEM_EVENTS": "n",
    # It remembers what kind of memory an address is, and cannot without the watch; the driver is asked instead, when
    # memory is registered, and a read carries that registration.
    "UCX_MEMTYPE_CACHE": "n",
}


BUILDS = ("nixl_cu13", "nixl_cu12")


def load_bindings() -> ModuleType:
    for key, value in UCX_DEFAULTS.items():
        os.environ.setdefault(key, value)
    try:
        # the meta package, where it is there, picks the build (CUDA 12, 13) that fits this machine; the class
        # `nixl_agent` is not used because it fixes the progress thread's delay
        from nixl import _bindings
    except ImportError as error:
        return _other_build(error)
    bindings: ModuleType = _bindings
    return bindings


def _other_build(refusal: ImportError) -> ModuleType:
    """A build by itself; NIXL 1.5.1's package goes by the cuda-bindings that torch imports, and refuses others."""
    for build in BUILDS:
        try:
            return importlib.import_module(f"{build}._bindings")
        except ImportError:
            continue
    raise TransferError(FailureKind.TRANSFER, f"NIXL cannot be loaded ({refusal}): pip install nixl-cu13") from refusal


class Agent:
    """One NIXL agent with one backend. Handles are NIXL's own: whoever got one releases it.

    Without a progress thread, asking for a read's status moves all reads on; ``progress`` does in between.
    """

    def __init__(self, name: str, backend: str, options: Mapping[str, str], *, progress_thread: bool = True) -> None:
        self.name = name
        self.progress_thread = progress_thread
        self.nixl = load_bindings()
        self.errors: tuple[type[Exception], ...] = tuple(
            v for k, v in vars(self.nixl).items() if k.startswith("nixl") and k.endswith("Error")
        )
        config = self.nixl.nixlAgentConfig()
        config.useProgThread = progress_thread
        config.pthrDelay = PROGRESS_DELAY_US
        config.useListenThread = False
        try:
            self._agent: Any = self.nixl.nixlAgent(name, config)
            self._backends = [self._agent.createBackend(backend, dict(options))]
        except self.errors as error:
            raise TransferError(
                FailureKind.TRANSFER,
                f"NIXL cannot start its {backend} backend with options {dict(options)}: {error}; "
                "check nixl_backend and nixl_options",
            ) from error

    def register(self, spans: Sequence[tuple[int, int]], device: int | None) -> None:
        """Makes ``(address, size)`` ranges readable. For the life of the agent."""
        rows = np.array([(address, size, device or 0) for address, size in spans], dtype=np.uint64)
        try:
            self._agent.registerMem(self.nixl.nixlRegDList(self._segment(device), rows), self._backends)
        except self.errors as error:
            what = "host memory" if device is None else f"memory of GPU {device}"
            raise TransferError(
                FailureKind.TRANSFER,
                f"NIXL cannot register {sum(size for _, size in spans)} bytes of {what} ({error}); "
                "with RDMA, check the memlock limit (ulimit -l)",
            ) from error

    def metadata(self) -> bytes:
        """What another agent must ``load`` before it can read what is registered by now."""
        return bytes(self._agent.getLocalMD())

    def load(self, name: str, metadata: bytes) -> None:
        """Meets another agent, or learns what it registered since."""
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except self.errors as error:
            raise TransferError(FailureKind.CONNECT, f"NIXL cannot connect to {name}: {error}") from error
        if loaded != name.encode() and loaded != name:
            raise TransferError(FailureKind.CONNECT, f"NIXL metadata of {loaded!r} was sent in the name of {name}")

    def forget(self, name: str) -> bool:
        """False: NIXL had dropped it already, as it does on a disconnect."""
        try:
            self._agent.invalidateRemoteMD(name)
        except self.errors:
            return False
        return True

    def prepare(self, rows: U64, device: int | None, remote: str | None = None) -> int:
        """A descriptor list, ``[n, 3]`` of (address, size, unused), here or in the memory of an agent."""
        rows[:, 2] = device or 0
        descriptors = self.nixl.nixlXferDList(self._segment(device), rows)
        try:
            if remote is None:
                return int(self._agent.prepXferDlist(descriptors, self._backends))
            return int(self._agent.prepXferDlist(remote, descriptors, self._backends))
        except self.errors as error:
            whose = "this node" if remote is None else remote
            raise TransferError(FailureKind.CONNECT, f"NIXL cannot read memory of {whose}: {error}") from error

    def release_list(self, handle: int) -> None:
        self._agent.releasedDlistH(handle)

    def make_read(self, local: int, local_ids: I32, remote: int, remote_ids: I32) -> int:
        """A read of list entries, neighbours merged; not started. Raises what NIXL raises (``errors``)."""
        return int(
            self._agent.makeXferReq(
                self.nixl.NIXL_READ, local, local_ids, remote, remote_ids, "", self._backends, False
            )
        )

    def post(self, handle: int) -> Any:
        """Starts it. Raises what NIXL raises."""
        return self._agent.postXferReq(handle)

    def status(self, handle: int) -> Any:
        """Raises what NIXL raises."""
        return self._agent.getXferStatus(handle)

    def progress(self) -> None:
        """Lets UCX answer its peers."""
        self._agent.getNotifs({})

    def release_read(self, handle: int) -> None:
        """Only for a read that has ended."""
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Deregisters everything."""
        del self._agent

    def _segment(self, device: int | None) -> Any:
        return self.nixl.DRAM_SEG if device is None else self.nixl.VRAM_SEG
