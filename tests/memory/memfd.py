"""A driver of virtual memory over memfd and mmap: what CudaDriver does with device memory, with the host's.

Handles are memfds, reservations are inaccessible mappings, mapping lays a memfd over a part of one. Imported by the
tests of everything that stands on :class:`pd_serve.memory.driver.VirtualMemoryDriver`; fds work across processes.

Faults: ``refuse`` names the handle types that the machine does not permit, ``fail`` lets calls to come fail,
``capacity`` is the device's memory. Misuse that CUDA punishes with an error or worse is an AssertionError here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections import deque
from dataclasses import dataclass, field

from pd_serve.memory.driver import DriverError, HandleType, MemoryKind

GRANULARITY = 64 << 10
INVALID = "CUDA_ERROR_INVALID_VALUE"
NOT_PERMITTED = "CUDA_ERROR_NOT_PERMITTED"
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    got = _libc.mmap(address, size, protection, flags, fd, 0)
    if got in (None, _FAILED):
        raise DriverError("mmap", os.strerror(ctypes.get_errno()))
    return int(got)


@dataclass
class _Handle:
    fd: int
    size: int
    kind: MemoryKind | None  # None: imported
    released: bool = False  # memory lives on while it is mapped, as CUDA's does
    mappings: int = 0


@dataclass
class _Reservation:
    size: int
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)  # address: size, handle
    base: int = 0  # of the mmap that an aligned reservation lies in
    base_size: int = 0


class MemfdDriver:
    """``granularities``: by handle type and RDMA flag, where it matters that they differ."""

    _fabric: dict[bytes, int] = {}  # tokens stand for memory of this process only

    def __init__(
        self,
        *,
        refuse: dict[HandleType, str] | None = None,
        rdma: bool = False,
        refuse_rdma: str = "",
        capacity: int = 1 << 40,
        granularity: int = GRANULARITY,
        granularities: dict[tuple[HandleType, bool], int] | None = None,
    ) -> None:
        self.refuse = dict(refuse or {})
        self.rdma = rdma
        self.refuse_rdma = refuse_rdma
        self.capacity = capacity
        self._granularity = granularity
        self._granularities = dict(granularities or {})
        self.fail_next: dict[str, deque[str]] = {}  # method: codes of the calls to come, "" for success
        self.calls: list[str] = []
        self.synchronized = 0
        self._handles: dict[int, _Handle] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._next = 1

    # what tests look at

    @property
    def live_handles(self) -> int:
        return sum(not handle.released for handle in self._handles.values())

    @property
    def live_reservations(self) -> int:
        return len(self._reservations)

    @property
    def live_mappings(self) -> int:
        return sum(len(reservation.mapped) for reservation in self._reservations.values())

    @property
    def used(self) -> int:
        """Bytes of physical memory that this driver created and that still exist."""
        return sum(handle.size for handle in self._handles.values() if handle.kind is not None)

    def check_clean(self) -> None:
        """Raises where anything is left."""
        left = (self.live_handles, self.live_reservations, self.live_mappings, len(self._handles))
        assert left == (0, 0, 0, 0), f"handles, reservations, mappings, memories left: {left}"

    def fail(self, call: str, *codes: str) -> None:
        """The next calls of ``call`` end with these codes ("": they work)."""
        self.fail_next.setdefault(call, deque()).extend(codes)

    def is_mapped(self, address: int) -> bool:
        return any(
            at <= address < at + size
            for reservation in self._reservations.values()
            for at, (size, _) in reservation.mapped.items()
        )

    # VirtualMemoryDriver

    def granularity(self, kind: MemoryKind) -> int:
        self._enter("granularity")
        return self._granularities.get((kind.handle_type, kind.rdma), self._granularity)

    def rdma_supported(self, device: int) -> bool:
        self._enter("rdma_supported")
        return self.rdma

    def create(self, size: int, kind: MemoryKind) -> int:
        self._enter("create")
        if kind.handle_type in self.refuse:
            raise DriverError("create", self.refuse[kind.handle_type])
        if kind.rdma and self.refuse_rdma:
            raise DriverError("create", self.refuse_rdma)
        if size <= 0 or size % self._granularities.get((kind.handle_type, kind.rdma), self._granularity):
            raise DriverError("create", INVALID)
        if self.used + size > self.capacity:
            raise DriverError("create", OUT_OF_MEMORY)
        fd = os.memfd_create("pd-serve-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return self._add(_Handle(fd, size, kind))

    def release(self, handle: int) -> None:
        self._enter("release")
        found = self._live(handle, "release")
        found.released = True
        self._collect(handle)

    def reserve(self, size: int, alignment: int) -> int:
        self._enter("reserve")
        if size <= 0 or size % mmap.PAGESIZE or alignment & (alignment - 1):
            raise DriverError("reserve", INVALID)
        spare = max(alignment, mmap.PAGESIZE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _mmap(None, size + spare, _PROT_NONE, flags, -1)
        address = -(-base // spare) * spare
        self._reservations[address] = _Reservation(size, base=base, base_size=size + spare)
        return address

    def free_address(self, address: int, size: int) -> None:
        self._enter("free_address")
        reservation = self._reservations.get(address)
        assert reservation is not None, "free_address of what was never reserved"
        assert reservation.size == size, "free_address with another size"
        assert not reservation.mapped, "free_address of a range that is still mapped"
        del self._reservations[address]
        _libc.munmap(reservation.base, reservation.base_size)

    def map(self, address: int, size: int, handle: int, device: int) -> None:
        self._enter("map")
        found = self._live(handle, "map")
        reservation = self._reservation_of(address, size)
        if size > found.size:
            raise DriverError("map", INVALID)
        for at, (mapped_size, _) in reservation.mapped.items():
            assert address + size <= at or at + mapped_size <= address, "map over what is mapped already"
        _mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, found.fd)
        reservation.mapped[address] = (size, handle)
        found.mappings += 1

    def unmap(self, address: int, size: int) -> None:
        self._enter("unmap")
        reservation = self._reservation_of(address, size)
        assert address in reservation.mapped, "unmap of what is not mapped"
        mapped_size, handle = reservation.mapped.pop(address)
        assert mapped_size == size, "unmap with another size than map's"
        _mmap(address, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)
        self._handles[handle].mappings -= 1
        self._collect(handle)

    def export_fd(self, handle: int) -> int:
        self._enter("export_fd")
        found = self._live(handle, "export_fd")
        if found.kind is not None and found.kind.handle_type is not HandleType.POSIX_FD:
            raise DriverError("export_fd", INVALID)
        return os.dup(found.fd)

    def import_fd(self, fd: int) -> int:
        self._enter("import_fd")
        try:
            size = os.fstat(fd).st_size
            own = os.dup(fd)
        except OSError as error:
            raise DriverError("import_fd", INVALID) from error
        if size <= 0:
            os.close(own)
            raise DriverError("import_fd", INVALID)
        return self._add(_Handle(own, size, None))

    def export_fabric(self, handle: int) -> bytes:
        self._enter("export_fabric")
        found = self._live(handle, "export_fabric")
        if found.kind is None or found.kind.handle_type is not HandleType.FABRIC:
            raise DriverError("export_fabric", INVALID)
        token = secrets.token_bytes(64)
        self._fabric[token] = os.dup(found.fd)
        return token

    def import_fabric(self, fabric: bytes) -> int:
        self._enter("import_fabric")
        if fabric not in self._fabric:
            raise DriverError("import_fabric", INVALID)
        fd = os.dup(self._fabric[fabric])
        return self._add(_Handle(fd, os.fstat(fd).st_size, None))

    def synchronize(self, device: int) -> None:
        self._enter("synchronize")
        self.synchronized += 1

    def memory_info(self, device: int) -> tuple[int, int]:
        self._enter("memory_info")
        return self.capacity - self.used, self.capacity

    def copy_to_host(self, target: int, source: int, size: int, device: int) -> None:
        self._enter("copy_to_host")
        assert self.is_mapped(source) and self.is_mapped(source + size - 1), "copy from what is not mapped"
        ctypes.memmove(target, source, size)

    def copy_to_device(self, target: int, source: int, size: int, device: int) -> None:
        self._enter("copy_to_device")
        assert self.is_mapped(target) and self.is_mapped(target + size - 1), "copy to what is not mapped"
        ctypes.memmove(target, source, size)

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        codes = self.fail_next.get(call)
        if codes:
            code = codes.popleft()
            if code:
                raise DriverError(call, code)

    def _add(self, handle: _Handle) -> int:
        number, self._next = self._next, self._next + 1
        self._handles[number] = handle
        return number

    def _live(self, handle: int, call: str) -> _Handle:
        found = self._handles.get(handle)
        assert found is not None and not found.released, f"{call} of a handle that is gone"
        return found

    def _collect(self, handle: int) -> None:
        found = self._handles[handle]
        if found.released and not found.mappings:
            os.close(found.fd)
            del self._handles[handle]

    def _reservation_of(self, address: int, size: int) -> _Reservation:
        for start, reservation in self._reservations.items():
            if start <= address and address + size <= start + reservation.size:
                return reservation
        raise AssertionError("an address that is not reserved")
