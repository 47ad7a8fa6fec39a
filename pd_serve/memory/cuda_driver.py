"""The CUDA driver behind :class:`pd_serve.memory.driver.VirtualMemoryDriver`, through ``cuda.bindings`` (12.9 or 13).

Made by whoever owns device memory or asks what a machine offers. It knows no tags and keeps no books; addresses and
handles are plain integers. Calls may come from any thread, those that torch frees memory on included: each makes
the device's primary context current, the one that torch uses too, and puts back what was current before.

``cuda.bindings`` and libcuda are looked for when a :class:`CudaDriver` is made, never when this is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pd_serve.memory.driver import DriverError, HandleType, MemoryKind

NO_BINDINGS = "NO_CUDA_BINDINGS"
NO_LIBRARY = "NO_LIBCUDA"
FABRIC_BYTES = 64
_PORTABLE, _DEVICE_MAP = 1, 2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP

_REASONS = {
    NO_BINDINGS: "the package cuda-bindings is not installed: pip install 'pd-serve[cuda]'",
    NO_LIBRARY: "libcuda is not found: the NVIDIA driver is not installed, or not visible in this container",
    "CUDA_ERROR_NO_DEVICE": "the NVIDIA driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this GPU does not support the loaded CUDA compatibility library",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "libcuda and the kernel's NVIDIA driver differ in version",
}


@dataclass(frozen=True)
class DeviceFacts:
    """What the driver says of one device. Fabric handles: only an allocation tells whether they are permitted."""

    ordinal: int
    name: str
    uuid: str
    pci_bus_id: str
    total_bytes: int
    compute_capability: tuple[int, int]
    virtual_memory: bool  # cuMem*: what the cumem allocator needs
    posix_fd_handles: bool
    fabric_handles: bool
    rdma_with_virtual_memory: bool  # GPUDirect RDMA of cuMem* memory
    dma_buf: bool
    integrated: bool  # no memory of its own
    host_page_tables: bool  # host and device share one memory and its page tables, such as on GH200

    @property
    def unified_memory(self) -> bool:
        """Host memory that is pinned takes from what the GPU has, or need not be pinned."""
        return self.integrated or self.host_page_tables


@dataclass(frozen=True)
class Mapping:
    """Physical memory at an address. ``handle``: one more reference to it, to be released."""

    address: int
    size_bytes: int
    handle: int
    handle_type: HandleType


class CudaDriver:
    """Raises DriverError where there is no CUDA; :func:`reason` puts it into words."""

    def __init__(self) -> None:
        try:
            self._cu: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DriverError("import cuda.bindings.driver", NO_BINDINGS) from error
        self._contexts: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)
        cu = self._cu
        self._handle_types = {
            HandleType.FABRIC: cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC,
            HandleType.POSIX_FD: cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            HandleType.NONE: cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE,
        }

    def close(self) -> None:
        """Gives up its hold on the devices' contexts. Memory must have been freed."""
        with self._lock:
            contexts, self._contexts = self._contexts, {}
        for device in contexts:
            self._call("cuDevicePrimaryCtxRelease", self._device(device))

    # facts

    def version(self) -> str:
        """The newest CUDA that the driver supports, such as 13.0."""
        number = int(self._call("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def device_facts(self, device: int) -> DeviceFacts:
        """Opens no context on the device."""
        number = self._device(device)
        name = self._call("cuDeviceGetName", 256, number)
        bus_id = self._call("cuDeviceGetPCIBusId", 32, number)
        return DeviceFacts(
            ordinal=device,
            name=_text(name),
            uuid=bytes(self._call("cuDeviceGetUuid", number).bytes).hex(),
            pci_bus_id=_text(bus_id),
            total_bytes=int(self._call("cuDeviceTotalMem", number)),
            compute_capability=(
                self._attribute(device, "COMPUTE_CAPABILITY_MAJOR"),
                self._attribute(device, "COMPUTE_CAPABILITY_MINOR"),
            ),
            virtual_memory=bool(self._attribute(device, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
            posix_fd_handles=bool(self._attribute(device, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
            fabric_handles=bool(self._attribute(device, "HANDLE_TYPE_FABRIC_SUPPORTED")),
            rdma_with_virtual_memory=self.rdma_supported(device),
            dma_buf=bool(self._attribute(device, "DMA_BUF_SUPPORTED")),
            integrated=bool(self._attribute(device, "INTEGRATED")),
            host_page_tables=bool(self._attribute(device, "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES")),
        )

    # VirtualMemoryDriver

    def granularity(self, kind: MemoryKind) -> int:
        flag = self._cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        with self._current(kind.device):
            return int(self._call("cuMemGetAllocationGranularity", self._properties(kind), flag))

    def rdma_supported(self, device: int) -> bool:
        return bool(self._attribute(device, "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"))

    def create(self, size: int, kind: MemoryKind) -> int:
        with self._current(kind.device):
            return int(self._call("cuMemCreate", size, self._properties(kind), 0))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def reserve(self, size: int, alignment: int) -> int:
        return int(self._call("cuMemAddressReserve", size, alignment, 0, 0))

    def free_address(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, handle: int, device: int) -> None:
        cu = self._cu
        access = cu.CUmemAccessDesc()
        access.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        with self._current(device):
            self._call("cuMemMap", address, size, 0, handle, 0)
            try:
                self._call("cuMemSetAccess", address, size, [access], 1)
            except DriverError:
                self._call("cuMemUnmap", address, size)
                raise

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def export_fd(self, handle: int) -> int:
        kind = self._handle_types[HandleType.POSIX_FD]
        return int(self._call("cuMemExportToShareableHandle", handle, kind, 0))

    def import_fd(self, fd: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", fd, self._handle_types[HandleType.POSIX_FD]))

    def export_fabric(self, handle: int) -> bytes:
        kind = self._handle_types[HandleType.FABRIC]
        exported = self._call("cuMemExportToShareableHandle", handle, kind, 0)
        return bytes(exported if isinstance(exported, bytes | bytearray) else exported.data)

    def import_fabric(self, fabric: bytes) -> int:
        if len(fabric) != FABRIC_BYTES:  # the driver would read on
            raise DriverError("cuMemImportFromShareableHandle", "CUDA_ERROR_INVALID_VALUE")
        buffer = ctypes.create_string_buffer(fabric, FABRIC_BYTES)
        kind = self._handle_types[HandleType.FABRIC]
        return int(self._call("cuMemImportFromShareableHandle", ctypes.addressof(buffer), kind))

    def mapping_of(self, address: int) -> Mapping | None:
        """What lies there, if it was mapped by these calls, whoever made them: another allocator of this process."""
        try:
            handle = int(self._call("cuMemRetainAllocationHandle", address))
        except DriverError as error:
            if error.code == "CUDA_ERROR_INVALID_VALUE":
                return None
            raise
        wanted = int(self._call("cuMemGetAllocationPropertiesFromHandle", handle).requestedHandleTypes)
        types = [kind for kind, flag in self._handle_types.items() if wanted & int(flag)]
        attributes = self._cu.CUpointer_attribute
        base = self._pointer_attribute(attributes.CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address)
        size = self._pointer_attribute(attributes.CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address)
        return Mapping(base, size, handle, types[0] if types else HandleType.NONE)

    def _pointer_attribute(self, attribute: Any, address: int) -> int:
        """64 bits. Not by cuda.bindings, which refuses attributes of mappings (TypeError, 13.0)."""
        function, _ = self._call("cuGetProcAddress", b"cuPointerGetAttribute", 12000, 0)
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)(int(function))
        value = ctypes.c_uint64(0)
        status = call(ctypes.addressof(value), int(attribute), address)
        if status:
            raise DriverError("cuPointerGetAttribute", f"error {status}")
        return value.value

    def synchronize(self, device: int) -> None:
        with self._current(device):
            self._call("cuCtxSynchronize")

    def memory_info(self, device: int) -> tuple[int, int]:
        with self._current(device):
            free, total = self._call("cuMemGetInfo")
            return int(free), int(total)

    def copy_to_host(self, target: int, source: int, size: int, device: int) -> None:
        with self._current(device):  # what a pointer's attribute names is not always the device that may read there
            self._call("cuMemcpyDtoH", target, source, size)

    def copy_to_device(self, target: int, source: int, size: int, device: int) -> None:
        with self._current(device):
            self._call("cuMemcpyHtoD", target, source, size)

    # host memory

    def pin(self, address: int, size: int) -> None:
        """Page-locks host memory, for all devices: copies run at the speed of the bus, and kernels can read it."""
        with self._any_current():
            self._call("cuMemHostRegister", address, size, _PORTABLE | _DEVICE_MAP)

    def device_address(self, address: int) -> int:
        """Of memory that is pinned: where kernels find it."""
        with self._any_current():
            return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def unpin(self, address: int) -> None:
        with self._any_current():
            self._call("cuMemHostUnregister", address)

    def _properties(self, kind: MemoryKind) -> Any:
        cu = self._cu
        properties = cu.CUmemAllocationProp()
        properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = kind.device
        properties.requestedHandleTypes = self._handle_types[kind.handle_type]
        properties.allocFlags.gpuDirectRDMACapable = int(kind.rdma)
        return properties

    def _device(self, ordinal: int) -> Any:
        return self._call("cuDeviceGet", ordinal)

    def _attribute(self, device: int, name: str) -> int:
        """0 also where bindings or driver are too old to know the attribute."""
        attribute = getattr(self._cu.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_" + name, None)
        if attribute is None:
            return 0
        try:
            return int(self._call("cuDeviceGetAttribute", attribute, self._device(device)))
        except DriverError as error:
            if error.code == "CUDA_ERROR_INVALID_VALUE":
                return 0
            raise

    def _context(self, device: int) -> Any:
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                context = self._contexts[device] = self._call("cuDevicePrimaryCtxRetain", self._device(device))
            return context

    @contextlib.contextmanager
    def _current(self, device: int) -> Iterator[None]:
        context = self._context(device)
        if int(self._call("cuCtxGetCurrent")) == int(context):
            yield
            return
        self._call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def _any_current(self) -> Iterator[None]:
        if int(self._call("cuCtxGetCurrent")):
            yield
            return
        with self._current(next(iter(self._contexts), 0)):
            yield

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls the driver: its one result, its tuple of results, or None."""
        try:
            status, *results = getattr(self._cu, name)(*arguments)
        except RuntimeError as error:  # what cuda.bindings raises when it does not find libcuda or a function of it
            raise DriverError(name, NO_LIBRARY if name == "cuInit" else "CUDA_ERROR_NOT_SUPPORTED") from error
        if int(status) != 0:
            raise DriverError(name, getattr(status, "name", str(status)))
        return results[0] if len(results) == 1 else tuple(results) or None


def reason(error: DriverError) -> str:
    """Why there is no CUDA here, and what to do about it."""
    return _REASONS.get(error.code, str(error))


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")
