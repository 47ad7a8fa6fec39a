"""What is made of the answers of GPUs, their driver and NVML; scripted, and on a real GPU where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pd_serve.doctor.checks import gpu, nixl, nvlink
from pd_serve.doctor.findings import Finding, Level
from pd_serve.doctor.machine import Machine
from pd_serve.doctor.selftest import Place, Rate, judge
from pd_serve.doctor.uct import Resources
from pd_serve.memory.cuda_driver import NO_LIBRARY, CudaDriver, DeviceFacts
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind, VirtualMemoryDriver

FACTS = DeviceFacts(
    0, "NVIDIA H200", "ab", "0000:04:00.0", 150 << 30, (9, 0), True, True, True, True, True, False, False
)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


class Driver:
    """Refuses the kinds of memory that ``refuse`` names."""

    def __init__(self, refuse: dict[HandleType, str], rdma: bool = True) -> None:
        self.refuse = refuse
        self.rdma = rdma
        self.open: set[int] = set()

    def rdma_supported(self, device: int) -> bool:
        return self.rdma

    def granularity(self, kind: MemoryKind) -> int:
        return 2 << 20

    def create(self, size: int, kind: MemoryKind) -> int:
        if kind.handle_type in self.refuse:
            raise DriverError("cuMemCreate", self.refuse[kind.handle_type])
        self.open.add(len(self.open) + 1)
        return len(self.open)

    def release(self, handle: int) -> None:
        self.open.discard(handle)

    def export_fabric(self, handle: int) -> bytes:
        return b""

    def export_fd(self, handle: int) -> int:
        return os.open("/dev/null", os.O_RDONLY)


def test_handle_types_are_probed_by_allocating() -> None:
    driver = Driver({HandleType.FABRIC: "CUDA_ERROR_NOT_PERMITTED"})
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    handles = gpu.probe(cast(VirtualMemoryDriver, driver), 0)
    assert handles == gpu.Handles("CUDA_ERROR_NOT_PERMITTED", "", "", "")
    assert not driver.open and len(list(Path("/proc/self/fd").iterdir())) == descriptors
    found = by_name(gpu.judge(FACTS, handles))
    assert "file descriptors" in found["cuda:0 cumem memory"].value
    assert found["cuda:0 fabric handles"].level is Level.NOTE
    assert "imex-channels" in found["cuda:0 fabric handles"].fix
    assert "dma-buf: yes" in found["cuda:0 GPUDirect RDMA"].value


def test_memory_that_cannot_be_exported_is_a_problem() -> None:
    refused = dict.fromkeys((HandleType.FABRIC, HandleType.POSIX_FD), "CUDA_ERROR_NOT_SUPPORTED")
    handles = gpu.probe(cast(VirtualMemoryDriver, Driver(refused, rdma=False)), 0)
    found = by_name(gpu.judge(FACTS, handles))
    assert found["cuda:0 cumem memory"].level is Level.PROBLEM
    assert found["cuda:0 GPUDirect RDMA"].level is Level.NOTE


def test_no_memory_at_all() -> None:
    handles = gpu.probe(cast(VirtualMemoryDriver, Driver(dict.fromkeys(HandleType, "CUDA_ERROR_OUT_OF_MEMORY"))), 0)
    found = by_name(gpu.judge(FACTS, handles))["cuda:0 cumem memory"]
    assert found.level is Level.PROBLEM and found.fix == "end what else fills the GPU"


def test_no_driver_is_a_plain_line_and_a_broken_one_a_problem(tmp_path: Any) -> None:
    found = gpu._no_driver(DriverError("cuInit", NO_LIBRARY), Machine(root=tmp_path))
    assert (found.level, found.value) == (Level.OK, "no CUDA driver; nodes compute on the CPU")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    found = gpu._no_driver(DriverError("cuInit", NO_LIBRARY), Machine(root=tmp_path))
    assert found.level is Level.PROBLEM and "libcuda" in found.value and found.fix


def test_a_driver_that_is_too_old_for_torch() -> None:
    assert gpu.judge_version("12.8", "13.0").level is Level.PROBLEM
    assert gpu.judge_version("13.0", "13.2").level is Level.OK
    assert gpu.judge_version("13.0", "").level is Level.OK


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_gives_what_it_is_asked_for() -> None:
    driver = CudaDriver()
    handles = gpu.probe(driver, 0)
    assert not handles.plain
    assert not handles.posix_fd
    assert "cuda:0" in by_name(gpu.judge(driver.device_facts(0), handles))


# --- NVLink


def card(index: int, **other: Any) -> nvlink.Gpu:
    values: dict[str, Any] = {
        "name": "NVIDIA H200",
        "links_up": 18,
        "links_down": 0,
        "link_mb_per_s": 26562,
        "to_switch": True,
        "fabric_state": 3,
        "fabric_status": 0,
        "clique": 0,
        "cluster": "0" * 32,
        "mig": False,
        "persistence": True,
    }
    return nvlink.Gpu(index, **values | other)


def pairs(nvlinked: bool, read: bool) -> dict[tuple[int, int], tuple[bool, bool]]:
    return {(0, 1): (nvlinked, read), (1, 0): (nvlinked, read)}


def test_two_joined_gpus() -> None:
    found = by_name(nvlink.judge(nvlink.Facts("580.1", (card(0), card(1)), pairs(True, True), ())))
    assert "18 of 18 links up, 478.116 GB/s each way in all, to NVSwitch" in found["GPU 0 NVLink"].value
    assert found["reading each other's memory"].value == "every pair, over NVLink"
    assert {finding.level for finding in found.values()} == {Level.OK}


def test_links_and_peers_that_are_missing() -> None:
    gpus = (card(0, links_up=0, links_down=18), card(1, links_up=12, links_down=6, mig=True))
    found = by_name(nvlink.judge(nvlink.Facts("580.1", gpus, pairs(False, False), ())))
    assert found["GPU 0 NVLink"].level is Level.PROBLEM
    assert found["GPU 1 NVLink"].level is Level.NOTE
    assert found["GPU 1"].level is Level.NOTE
    assert found["reading each other's memory"].level is Level.PROBLEM
    slow = by_name(nvlink.judge(nvlink.Facts("580.1", (card(0), card(1)), pairs(False, True), ())))
    assert "over PCIe between 0-1" in slow["reading each other's memory"].value


def test_a_domain_across_machines_needs_a_channel() -> None:
    member = card(0, cluster="ab" * 16, clique=7)
    found = by_name(nvlink.judge(nvlink.Facts("580.1", (member,), {}, ())))
    assert "clique 7" in found["NVLink across machines (MNNVL)"].value
    assert found["IMEX channels"].level is Level.PROBLEM and "nvidia-imex" in found["IMEX channels"].fix
    found = by_name(nvlink.judge(nvlink.Facts("580.1", (member,), {}, ("channel0",))))
    assert found["IMEX channels"].value == "channel0"
    found = by_name(nvlink.judge(nvlink.Facts("580.1", (card(0, fabric_state=2),), {}, ())))
    assert found["NVLink fabric"].level is Level.PROBLEM and "in progress" in found["NVLink fabric"].value


def test_nvml_that_knows_less_is_read_all_the_same() -> None:
    class Error(Exception): ...

    def refuse(*_: object) -> Any:
        raise Error

    names = (
        "nvmlDeviceGetNvLinkState nvmlDeviceGetMigMode nvmlDeviceGetPersistenceMode nvmlDeviceGetP2PStatus "
        "nvmlDeviceGetFieldValues"
    )
    nvml = SimpleNamespace(
        NVMLError=Error,
        NVML_NVLINK_MAX_LINKS=18,
        NVML_P2P_CAPS_INDEX_NVLINK=1,
        NVML_P2P_CAPS_INDEX_READ=0,
        NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON=1,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlSystemGetDriverVersion=lambda: b"470.1",
        nvmlDeviceGetName=lambda _: "Tesla T4",
        **dict.fromkeys(names.split(), refuse),
    )
    facts = nvlink.read(nvml, ())
    assert facts.driver == "470.1" and facts.gpus[1].links_up == 0 and not any(facts.peers[0, 1])
    assert by_name(nvlink.judge(facts))["GPU 0 NVLink"].value == "Tesla T4 has none"


# --- libraries and lanes


def test_transports_of_ucx_are_held_against_the_machine(tmp_path: Any) -> None:
    everything = Resources(
        ("ib", "tcp"), {"rc_mlx5": ["mlx5_0:1"], "cma": ["memory"], "tcp": ["eth0"], "self": ["memory"]}
    )
    little = Resources(("ib", "tcp"), {"tcp": ["eth0"]})
    machine = Machine(root=tmp_path)
    assert {finding.level for finding in nixl.judge(everything, machine)} == {Level.OK}
    assert [finding.what for finding in nixl.judge(little, machine)][1:] == ["UCX and shared memory"]
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    found = by_name(nixl.judge(little, machine))
    assert "opens no device" in found["UCX and RDMA"].value
    assert found["UCX and CUDA"].level is Level.PROBLEM
    assert by_name(nixl.judge(everything, machine))["UCX transports"].value.startswith("rc_mlx5 (mlx5_0:1); cma")


def test_the_choice_follows_from_the_figures() -> None:
    gpus = Place((0, 1), True, True)
    rates = [Rate("nvlink", 350.0), Rate("nixl", 0.5), Rate("ucx", None, "not installed")]
    found = by_name(judge(rates, "auto", gpus))
    assert found["pd-serve would use"].value.startswith("nvlink between cuda:0 and cuda:1")
    assert (
        found["nixl"].level is Level.NOTE
        and "not used" in found["nixl"].value
        and "file descriptor" in found["nixl"].fix
    )
    assert found["ucx"].level is Level.NOTE and "not installed" in found["ucx"].value
    forced = by_name(judge(rates, "nixl", gpus))
    assert forced["nixl"].level is Level.PROBLEM
    assert forced["pd-serve would use"].level is Level.NOTE and "nvlink" in forced["pd-serve would use"].fix
    assert by_name(judge(rates, "ucx", gpus))["pd-serve would use"].broken
    slow = by_name(judge([Rate("nvlink", 20.0)], "auto", gpus))["nvlink"]
    assert slow.level is Level.PROBLEM and "nvidia-smi nvlink" in slow.fix
    for busy, level in ((False, Level.PROBLEM), (True, Level.NOTE)):
        assert by_name(judge([Rate("nixl", 0.8)], "auto", Place(), busy=busy))["nixl"].level is level
    host = by_name(judge([Rate("nixl", 5.0), Rate("ucx", 6.0)], "auto", Place()))
    assert host["pd-serve would use"].value.startswith("nixl between nodes of this machine")
    nothing = by_name(judge([Rate("nixl", None, "gone")], "auto", Place()))["pd-serve would use"]
    assert nothing.broken and nothing.fix
    late = by_name(judge([Rate("nixl", None, "no answer", too_late=True)], "auto", Place()))
    assert {finding.level for finding in late.values()} == {Level.NOTE}
    assert late["pd-serve would use"].value.startswith("nixl") and "probably" in late["pd-serve would use"].value
