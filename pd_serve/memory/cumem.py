"""The cumem allocator: device memory that can be exported, counted by tag, and put to sleep at addresses that stay.

Owned by the engine; torch allocates from it through :mod:`pd_serve.memory.torch_pool`, which knows torch so that this
file need not: here are the books, over the dozen calls of :mod:`pd_serve.memory.driver`. All methods may be called from
any thread. It never hands out memory whose books it could not write, and no failure outlasts the call that met it.

One allocation is one handle: what is exported to a peer or registered with a NIC is never stitched together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from pd_serve.errors import PDServeError
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind, VirtualMemoryDriver
from pd_serve.memory.host_buffers import HostBuffer, HostBuffers
from pd_serve.memory.region import Segment
from pd_serve.memory.usage import Counter, fragmentation
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)

# What an allocation outside of any tag's context belongs to.
UNTAGGED = "other"


class OutOfDeviceMemory(PDServeError):
    """The device has too little memory left. Nothing was allocated; a later attempt may succeed."""


class MemoryAsleep(PDServeError):
    """Memory was asked for under a tag that sleeps. Wake it first."""


def _words(kind: MemoryKind) -> tuple[int, str, str]:
    return kind.device, kind.handle_type.value, "yes" if kind.rdma else "no"


@dataclass
class _Allocation:
    """One range of addresses and what stands behind it. ``ready``: mapped, with its content."""

    address: int
    reserved: int  # bytes of addresses, of which the first ``size`` have memory
    requested: int
    size: int  # a multiple of the granularity
    tag: str
    kind: MemoryKind
    handle: int | None = None
    mapped: bool = False
    ready: bool = False
    backup: HostBuffer | None = field(default=None, repr=False)


class CumemAllocator:
    """Device memory of one device. ``host``: where sleeping memory is kept; it stays the caller's."""

    def __init__(self, driver: VirtualMemoryDriver, device: int, host: HostBuffers) -> None:
        self.device = device
        self._driver = driver
        self._host = host
        self._lock = threading.RLock()
        self._local = threading.local()
        self._kind: MemoryKind | None = None
        self._granularity = 0
        self._allocations: dict[int, _Allocation] = {}
        self._counters: dict[str, Counter] = {}

    # what memory is made of

    @property
    def kind(self) -> MemoryKind:
        """What this machine permits, found by allocating: the driver's attributes promise more than it keeps.

        Raises OutOfDeviceMemory, DriverError; both are found out anew when asked again.
        """
        with self._lock:
            if self._kind is None:
                self._kind = self._probe()
                self._granularity = self._driver.granularity(self._kind)
            return self._kind

    def _probe(self) -> MemoryKind:
        """Fabric handles reach farthest, then file descriptors; memory a NIC can read where there is a choice.

        Whatever a refusal says, the next kind is tried: a machine without IMEX may answer with any of several codes.
        """
        rdma = (True, False) if self._driver.rdma_supported(self.device) else (False,)
        refusals: list[DriverError] = []
        for handle_type in HandleType:
            for capable in rdma:
                kind = MemoryKind(self.device, handle_type, capable)
                try:
                    self._try(kind)
                except DriverError as refusal:
                    log.info("cuda:%d has no memory with handles %s, RDMA %s: %s", *_words(kind), refusal)
                    refusals.append(refusal)
                else:
                    log.info("cuda:%d has memory with handles %s, RDMA %s", *_words(kind))
                    return kind
        if all(refusal.out_of_memory for refusal in refusals):
            raise OutOfDeviceMemory(
                f"cuda:{self.device} has no memory left for a first allocation; "
                f"end what else runs on it, or choose another device"
            )
        raise refusals[-1]

    def _try(self, kind: MemoryKind) -> None:
        handle = self._driver.create(self._driver.granularity(kind), kind)
        try:
            if kind.handle_type is HandleType.FABRIC:
                self._driver.export_fabric(handle)
            elif kind.handle_type is HandleType.POSIX_FD:
                os.close(self._driver.export_fd(handle))
        finally:
            self._driver.release(handle)

    # tags

    @property
    def tag(self) -> str:
        """What this thread allocates under."""
        stack: list[str] = getattr(self._local, "tags", [])
        return stack[-1] if stack else UNTAGGED

    @contextlib.contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """What this thread allocates inside belongs to ``tag``; contexts nest. Frees need no context."""
        stack: list[str] = self._local.__dict__.setdefault("tags", [])
        depth = len(stack)
        stack.append(tag)
        try:
            yield
        finally:
            del stack[depth:]

    # allocating

    def malloc(self, size: int, *, reserve: int = 0) -> int:
        """Memory of at least ``size`` bytes under the current tag: its address.

        ``reserve``: the most bytes that :meth:`resize` may give it later; addresses cost no memory.
        Raises OutOfDeviceMemory, MemoryAsleep, DriverError; then nothing was allocated.
        """
        if size <= 0:
            raise ValueError(f"{size} bytes cannot be allocated")
        tag = self.tag
        with self._lock:
            if tag in self.asleep:
                raise MemoryAsleep(f"'{tag}' is asleep: wake it before allocating under it")
            kind = self.kind
            mapped_size = self._rounded(size)
            reserved = max(mapped_size, self._rounded(reserve))
            address = self._driver.reserve(reserved, self._granularity)
            allocation = _Allocation(address, reserved, size, mapped_size, tag, kind)
            try:
                self._put_up(allocation)
            except BaseException:
                self._forget(allocation)
                raise
            allocation.ready = True
            self._allocations[address] = allocation
            self._counter(tag).add(size)
            return address

    def free(self, address: int) -> None:
        """Returns what ``malloc`` gave, asleep or not, after the device has done its work.

        Raises ValueError for any other address, and DriverError: then the memory is still allocated, or
        where the driver had gone half the way, lost.
        """
        with self._lock:
            allocation = self._allocations.get(address)
            if allocation is None:
                raise ValueError(f"{address:#x} was not allocated here, or is free already")
            if allocation.mapped:
                self._driver.synchronize(self.device)
                self._driver.unmap(address, allocation.size)
                allocation.mapped = False
            del self._allocations[address]
            self._counter(allocation.tag).add(-allocation.requested)
            self._drop_backup(allocation)
            self._take_down(allocation)
            self._driver.free_address(address, allocation.reserved)

    def resize(self, sizes: Mapping[int, int]) -> None:
        """Exchanges the memory behind addresses that ``malloc`` gave: ``{address: bytes}``, all of them or none.

        What an address is given is one new handle, within what was reserved for it, that holds anything. Addresses
        stay, and so do CUDA graphs that were captured over them. Nothing may run on the memory, and peers and NICs
        must have let go of it. The old memory is given back first, so that the new may take all there is.

        Raises ValueError, MemoryAsleep: nothing has changed. OutOfDeviceMemory (it says how much is free),
        DriverError: sizes are as before, contents are not; where even that much was not to be had again, ``asleep``
        names the tags that have no memory now: they can be woken, freed, and slept on.
        """
        with self._lock:
            allocations = [self._resizable(address, size) for address, size in sizes.items()]
            self._driver.synchronize(self.device)
            before = [(a, a.requested) for a in allocations]
            try:
                self._exchange([(a, sizes[a.address]) for a in allocations])
            except BaseException:
                try:
                    self._exchange(before)
                except PDServeError as error:
                    log.error("cuda:%d: the memory of before resizing is not to be had again: %s", self.device, error)
                    for allocation in allocations:  # half of one is no use to anybody
                        if not allocation.ready:
                            with contextlib.suppress(DriverError):
                                self._take_down(allocation)
                raise
            finally:
                for allocation, requested in before:
                    self._counter(allocation.tag).add(allocation.requested - requested)

    def _resizable(self, address: int, size: int) -> _Allocation:
        allocation = self._allocations.get(address)
        if allocation is None:
            raise ValueError(f"{address:#x} was not allocated here, or is free already")
        if not 0 < size <= allocation.reserved:
            raise ValueError(f"{size} bytes do not fit into the {allocation.reserved} bytes reserved at {address:#x}")
        if not allocation.ready:
            raise MemoryAsleep(f"'{allocation.tag}' is asleep: wake it before resizing it")
        return allocation

    def _exchange(self, sizes: list[tuple[_Allocation, int]]) -> None:
        """New memory for all; in whatever state they are. Those that have none in the end are not ready."""
        for allocation, size in sizes:
            allocation.ready = False
            self._take_down(allocation)
            allocation.requested, allocation.size = size, self._rounded(size)
        for allocation, _ in sizes:
            self._put_up(allocation)
        for allocation, _ in sizes:
            allocation.ready = True

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def close(self) -> None:
        """Frees everything. Nobody may use any of it any more."""
        with self._lock:
            for address in list(self._allocations):
                self.free(address)

    # sleep

    @property
    def asleep(self) -> list[str]:
        """Tags of which something cannot be used, in the order of their first allocation."""
        with self._lock:
            return list(dict.fromkeys(a.tag for a in self._allocations.values() if not a.ready))

    def sleep(self, keep: Collection[str] = ()) -> None:
        """Gives back all physical memory. What is allocated under tags of ``keep`` is copied to the host first.

        Addresses stay reserved. Peers and NICs must have let go of the memory. Of what sleeps already, content that is
        no longer kept is dropped. Raises PDServeError or MemoryError; where copying failed everything is still awake,
        and where giving back failed ``asleep`` says what sleeps; either may be called again.
        """
        with self._lock:
            awake = [a for a in self._allocations.values() if a.ready]
            if awake:
                self._driver.synchronize(self.device)
            self._back_up([a for a in awake if a.tag in keep])
            for allocation in self._allocations.values():
                if allocation.tag not in keep and allocation.backup is not None:
                    self._drop_backup(allocation)
            failure: DriverError | None = None
            for allocation in [a for a in self._allocations.values() if a.ready or a.mapped]:
                try:
                    self._take_down(allocation)
                except DriverError as error:
                    log.error("memory at %#x does not go to sleep: %s", allocation.address, error)
                    failure = error
                    if allocation.mapped:  # as before, with its content
                        self._drop_backup(allocation)
                        continue
                allocation.ready = False
            if failure is not None:
                raise failure

    def wake(self, tags: Collection[str] | None = None) -> None:
        """Puts physical memory behind the addresses of ``tags`` (None: all), with the content that was kept.

        What was not kept holds anything. Raises OutOfDeviceMemory or DriverError; what had not been woken by then still
        sleeps, with its content, and waking may be tried again.
        """
        with self._lock:
            for allocation in self._allocations.values():
                if allocation.ready or (tags is not None and allocation.tag not in tags):
                    continue
                try:
                    self._put_up(allocation)
                    if allocation.backup is not None:
                        backup = allocation.backup.address
                        self._driver.copy_to_device(allocation.address, backup, allocation.requested, self.device)
                except BaseException:
                    with contextlib.suppress(DriverError):
                        self._take_down(allocation)
                    raise
                allocation.ready = True
                self._drop_backup(allocation)

    def prepare(self, keep: Collection[str]) -> None:
        """Makes the host memory that sleeping with ``keep`` will need: pinning takes longer than copying."""
        with self._lock:
            sizes = [a.requested for a in self._allocations.values() if a.ready and a.tag in keep]
        for buffer in [self._host.take(size) for size in sizes]:
            self._host.give(buffer)

    def _back_up(self, allocations: list[_Allocation]) -> None:
        try:
            for allocation in allocations:
                allocation.backup = self._host.take(allocation.requested)
                backup = allocation.backup.address
                self._driver.copy_to_host(backup, allocation.address, allocation.requested, self.device)
        except BaseException:
            for allocation in allocations:
                self._drop_backup(allocation)
            raise

    def _drop_backup(self, allocation: _Allocation) -> None:
        if allocation.backup is not None:
            self._host.give(allocation.backup)
            allocation.backup = None

    # exporting and counting

    def segments(self, tag: str | None = None) -> list[Segment]:
        """What can be exported to peers: new handles at the same addresses after every sleep."""
        with self._lock:
            return [
                Segment(a.address, a.size, a.handle, a.kind.handle_type)
                for a in self._allocations.values()
                if a.ready and a.handle is not None and tag in (None, a.tag)
            ]

    def segment_of(self, address: int) -> Segment:
        """The segment that an address lies in. Raises ValueError where it lies in none that is awake."""
        for segment in self.segments():
            if segment.address <= address < segment.address + segment.size_bytes:
                return segment
        raise ValueError(f"{address:#x} is not memory of this allocator, or is asleep")

    def report(self, cached: Mapping[str, int] | None = None) -> MemoryReport:
        """``cached``: bytes, by tag, that torch was given and has no tensors in."""
        with self._lock:
            used = reserved = 0
            for tag, counter in self._counters.items():
                if counter.reserved:
                    used += max(0, counter.used - (cached or {}).get(tag, 0))
                    reserved += counter.reserved
            return MemoryReport(
                device=f"cuda:{self.device}",
                tags={tag: counter.usage() for tag, counter in self._counters.items()},
                fragmentation=fragmentation(used, reserved),
                asleep=self.asleep,
            )

    # one allocation's physical memory: every step is done or not done, and can be taken up again

    def _put_up(self, allocation: _Allocation) -> None:
        if allocation.handle is None:
            try:
                allocation.handle = self._driver.create(allocation.size, allocation.kind)
            except DriverError as error:
                if error.out_of_memory:
                    raise self._out_of_memory(allocation) from error
                raise
            self._counter(allocation.tag).reserved += allocation.size
        if not allocation.mapped:
            self._driver.map(allocation.address, allocation.size, allocation.handle, self.device)
            allocation.mapped = True

    def _take_down(self, allocation: _Allocation) -> None:
        if allocation.mapped:
            self._driver.unmap(allocation.address, allocation.size)
            allocation.mapped = False
        if allocation.handle is not None:
            self._driver.release(allocation.handle)
            allocation.handle = None
            self._counter(allocation.tag).reserved -= allocation.size

    def _forget(self, allocation: _Allocation) -> None:
        """Undoes an allocation that failed: as much of it as the driver lets us."""
        try:
            self._take_down(allocation)
            self._driver.free_address(allocation.address, allocation.reserved)
        except DriverError:
            log.exception("memory of a failed allocation cannot be returned")

    def _counter(self, tag: str) -> Counter:
        return self._counters.setdefault(tag, Counter())

    def _out_of_memory(self, allocation: _Allocation) -> OutOfDeviceMemory:
        try:
            free, total = self._driver.memory_info(self.device)
            rest = f"; {free} of {total} bytes are free"
        except DriverError:
            rest = ""
        return OutOfDeviceMemory(
            f"cuda:{self.device} has no {allocation.size} bytes for '{allocation.tag}'{rest}; "
            f"lower --kv-cache-memory, or end what else runs on the device"
        )
