"""The CUDA driver's calls, on bindings that record them: contexts, errors, and where there is no CUDA at all."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from pd_serve.memory import switches
from pd_serve.memory.cuda_driver import CudaDriver, Mapping, reason
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_PERMITTED = 800


class Names:
    """An enumeration whose members are their names."""

    def __getattr__(self, name: str) -> str:
        return name


class Bindings:
    """Contexts are 100 + the ordinal; any call succeeds unless it is in ``fail``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []  # with the context that was current
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.stack = [0]
        self.fail: dict[str, Status | Exception] = {}
        self.results: dict[str, tuple[Any, ...]] = {
            "cuDeviceGetCount": (2,),
            "cuDevicePrimaryCtxRetain": (0,),
            "cuMemCreate": (77,),
            "cuMemGetAllocationGranularity": (2 << 20,),
            "cuMemAddressReserve": (4 << 20,),
            "cuMemExportToShareableHandle": (5,),
            "cuMemGetInfo": (3, 4),
            "cuDriverGetVersion": (13020,),
            "cuDeviceGetAttribute": (1,),
            "cuDeviceGetName": (b"NVIDIA H200\0\0\0",),
            "cuDeviceGetPCIBusId": (b"0000:01:00.0\0",),
            "cuDeviceGetUuid": (SimpleNamespace(bytes=b"\1" * 16),),
            "cuDeviceTotalMem": (1 << 37,),
        }

    def __getattr__(self, name: str) -> Any:
        if name in ("CUmemAllocationProp", "CUmemAccessDesc"):
            return lambda: SimpleNamespace(location=SimpleNamespace(), allocFlags=SimpleNamespace())
        if not name.startswith("cu"):
            return Names()
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append((name, self.stack[-1]))
        self.arguments[name] = arguments
        failure = self.fail.get(name)
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:
            return (failure, *[None] * len(self.results.get(name, ())))
        match name:
            case "cuDeviceGet":
                return (Status.CUDA_SUCCESS, arguments[0])
            case "cuDevicePrimaryCtxRetain":
                return (Status.CUDA_SUCCESS, 100 + arguments[0])
            case "cuCtxGetCurrent":
                return (Status.CUDA_SUCCESS, self.stack[-1])
            case "cuCtxPushCurrent":
                self.stack.append(arguments[0])
                return (Status.CUDA_SUCCESS,)
            case "cuCtxPopCurrent":
                return (Status.CUDA_SUCCESS, self.stack.pop())
        return (Status.CUDA_SUCCESS, *self.results.get(name, ()))

    def context_of(self, name: str) -> int:
        return next(context for called, context in self.calls if called == name)


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    made = Bindings()
    original = importlib.import_module
    replace: Callable[..., Any] = lambda name, *rest: made if name == "cuda.bindings.driver" else original(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib, "import_module", replace)
    return made


KIND = MemoryKind(1, HandleType.POSIX_FD, True)


def test_the_devices_context_is_current_and_the_old_one_comes_back(bindings: Bindings) -> None:
    driver = CudaDriver()
    bindings.stack = [100]  # torch's, on another device
    assert driver.create(2 << 20, KIND) == 77
    assert bindings.context_of("cuMemCreate") == 101
    driver.map(1, 2, 77, 1)
    assert bindings.context_of("cuMemSetAccess") == 101
    driver.synchronize(0)
    assert bindings.context_of("cuCtxSynchronize") == 100
    driver.copy_to_host(1, 2, 3, 1)
    assert bindings.context_of("cuMemcpyDtoH") == 101
    assert driver.memory_info(1) == (3, 4)
    driver.pin(1, 2)
    assert bindings.context_of("cuMemHostRegister") == 100
    assert bindings.stack == [100]
    retained = [name for name, _ in bindings.calls].count("cuDevicePrimaryCtxRetain")
    driver.close()
    assert [name for name, _ in bindings.calls].count("cuDevicePrimaryCtxRelease") == retained == 2


def test_on_a_thread_without_a_context_none_is_left(bindings: Bindings) -> None:
    driver = CudaDriver()
    driver.create(2 << 20, KIND)
    driver.pin(1, 2)
    assert bindings.context_of("cuMemHostRegister") == 101  # any will do
    bindings.fail["cuMemCreate"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DriverError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY") as caught:
        driver.create(2 << 20, KIND)
    assert caught.value.out_of_memory
    assert bindings.stack == [0]


def test_granularity_and_allocation_are_asked_for_with_the_same_properties(bindings: Bindings) -> None:
    driver = CudaDriver()
    assert driver.granularity(KIND) == 2 << 20
    driver.create(2 << 20, KIND)
    asked, made = bindings.arguments["cuMemGetAllocationGranularity"][0], bindings.arguments["cuMemCreate"][1]
    assert asked == made
    assert made.location.id == 1
    assert made.allocFlags.gpuDirectRDMACapable == 1
    assert made.requestedHandleTypes == "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"


def test_a_mapping_without_access_is_undone(bindings: Bindings) -> None:
    driver = CudaDriver()
    bindings.fail["cuMemSetAccess"] = Status.CUDA_ERROR_NOT_PERMITTED
    with pytest.raises(DriverError, match="cuMemSetAccess: CUDA_ERROR_NOT_PERMITTED"):
        driver.map(1, 2, 77, 0)
    assert bindings.arguments["cuMemUnmap"] == (1, 2)


def test_handles_to_hand_over(bindings: Bindings) -> None:
    driver = CudaDriver()
    assert driver.export_fd(77) == 5
    bindings.results["cuMemExportToShareableHandle"] = (SimpleNamespace(data=b"f" * 64),)
    assert driver.export_fabric(77) == b"f" * 64
    bindings.results["cuMemImportFromShareableHandle"] = (78,)
    assert driver.import_fd(5) == 78
    assert driver.import_fabric(b"f" * 64) == 78
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        driver.import_fabric(b"short")


def test_what_somebody_else_has_mapped(bindings: Bindings) -> None:
    """cuda.bindings raises TypeError where it is asked for these attributes (13.0)."""
    cuda: Any = bindings
    cuda.CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MAPPING_SIZE=18, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR=19
    )
    cuda.CUmemAllocationHandleType = SimpleNamespace(
        CU_MEM_HANDLE_TYPE_FABRIC=8, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1, CU_MEM_HANDLE_TYPE_NONE=0
    )
    bindings.fail["cuPointerGetAttribute"] = TypeError("Unsupported attribute")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_int, ctypes.c_uint64)
    def attribute(value: Any, which: int, address: int) -> int:
        value[0] = {18: 2 << 20, 19: 3 << 40}[which]
        return 0 if address == (3 << 40) + 5 else 1

    bindings.results["cuGetProcAddress"] = (ctypes.cast(attribute, ctypes.c_void_p).value, 0)
    bindings.results["cuMemRetainAllocationHandle"] = (9,)
    bindings.results["cuMemGetAllocationPropertiesFromHandle"] = (SimpleNamespace(requestedHandleTypes=1),)
    driver = CudaDriver()
    assert driver.mapping_of((3 << 40) + 5) == Mapping(3 << 40, 2 << 20, 9, HandleType.POSIX_FD)
    with pytest.raises(DriverError):
        driver.mapping_of(7)
    bindings.fail["cuMemRetainAllocationHandle"] = Status.CUDA_ERROR_INVALID_VALUE
    assert driver.mapping_of(7) is None, "plain memory"


def test_facts_of_a_device(bindings: Bindings) -> None:
    driver = CudaDriver()
    facts = driver.device_facts(1)
    assert (facts.name, facts.pci_bus_id, facts.uuid) == ("NVIDIA H200", "0000:01:00.0", "01" * 16)
    assert facts.fabric_handles
    assert facts.unified_memory
    assert driver.version() == "13.2"
    assert driver.device_count() == 2
    assert not any(name == "cuDevicePrimaryCtxRetain" for name, _ in bindings.calls)
    bindings.fail["cuDeviceGetAttribute"] = Status.CUDA_ERROR_INVALID_VALUE  # an old driver
    assert not driver.device_facts(1).fabric_handles


def test_where_there_is_no_cuda(bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings.fail["cuInit"] = RuntimeError("libcuda is not there")
    with pytest.raises(DriverError, match="NO_LIBCUDA") as caught:
        CudaDriver()
    assert "NVIDIA driver is not installed" in reason(caught.value)
    assert "NVIDIA driver is not installed" in switches.cumem_unavailable_because()
    bindings.fail["cuInit"] = Status.CUDA_ERROR_NO_DEVICE
    assert "sees no GPU" in switches.cumem_unavailable_because()
    del bindings.fail["cuInit"]
    assert switches.cumem_unavailable_because() == ""
    assert switches.cumem_unavailable_because(2) == "there is no GPU 2, only 2"
    bindings.results["cuDeviceGetAttribute"] = (0,)
    assert "no virtual memory on NVIDIA H200" in switches.cumem_unavailable_because()

    def missing(_name: str) -> None:
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", missing)
    assert "pip install" in switches.cumem_unavailable_because()


def test_the_real_bindings_answer_without_a_driver() -> None:
    """Whatever this machine has: a driver, or a DriverError that can be put into words."""
    with contextlib.suppress(ImportError):
        importlib.import_module("cuda.bindings.driver")
    try:
        assert CudaDriver().device_count() > 0
    except DriverError as error:
        assert reason(error)
