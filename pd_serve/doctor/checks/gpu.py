"""GPUs, and the kinds of memory that their driver really gives: attributes promise more than allocations keep."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pd_serve.doctor.findings import Finding, note, ok, problem, size
from pd_serve.doctor.machine import Check, Machine
from pd_serve.memory.choice import torch_versions, what_there_is
from pd_serve.memory.cuda_driver import NO_BINDINGS, NO_LIBRARY, CudaDriver, DeviceFacts, reason
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind, VirtualMemoryDriver

_HANDLE_NAMES = {HandleType.FABRIC: "fabric handles", HandleType.POSIX_FD: "file descriptors"}


@dataclass(frozen=True)
class Handles:
    """What allocations of one device answered: an empty text for success, else the driver's error."""

    fabric: str
    posix_fd: str
    plain: str  # memory that cannot be exported
    rdma: str  # of the best of these, GPUDirect RDMA capable


def gpus(machine: Machine) -> list[Finding]:
    try:
        driver = CudaDriver()
        count = driver.device_count()
    except DriverError as error:
        return [_no_driver(error, machine)]
    findings = [judge_version(driver.version(), (torch_versions() or ("", ""))[1])]
    if not count:
        return [*findings, note("GPUs", "none is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        findings.append(ok("CUDA_VISIBLE_DEVICES", visible))
    for ordinal in range(count):
        try:
            facts = driver.device_facts(ordinal)
            findings += judge(facts, probe(driver, ordinal))
        except DriverError as error:
            findings.append(
                problem(f"cuda:{ordinal}", str(error), "reset the GPU, or leave it out of CUDA_VISIBLE_DEVICES")
            )
    return findings


def engines(machine: Machine) -> list[Finding]:
    """What --device auto leads to."""
    found = what_there_is(machine.root)
    if found.problem:
        return [
            problem(
                "engines",
                f"none would start: {found.problem.partition(':')[0]}",
                f"{found.problem.partition(':')[2].strip() or 'check nvidia-smi'}; or give nodes --device cpu",
            )
        ]
    return [ok("engines", f"compute on {'GPUs, from ' if found.device == 'cuda' else 'the cores: '}{found.why}")]


def judge_version(driver: str, torch: str) -> Finding:
    """``torch``: the CUDA it was built for; empty: none. Within a major version older drivers do."""
    text = f"supports CUDA {driver}"
    if torch and int(torch.partition(".")[0]) > int(driver.partition(".")[0]):
        fix = f"update the driver, or install torch for CUDA {driver.partition('.')[0]}"
        return problem("CUDA driver", f"{text}, and torch was built for {torch}", fix)
    return ok("CUDA driver", text)


def _no_driver(error: DriverError, machine: Machine) -> Finding:
    if error.code in (NO_LIBRARY, NO_BINDINGS) and not (machine.root / "dev/nvidiactl").exists():
        return ok("CUDA", "no CUDA driver; nodes compute on the CPU")
    # there is a GPU, and it cannot be used
    return problem(
        "CUDA", reason(error).partition(":")[0], reason(error).partition(":")[2].strip() or "check nvidia-smi"
    )


def probe(driver: VirtualMemoryDriver, device: int) -> Handles:
    """Allocates a little of each kind and exports it."""
    answers = {kind: _try(driver, MemoryKind(device, kind, False)) for kind in HandleType}
    best = next((kind for kind in HandleType if not answers[kind]), HandleType.NONE)
    rdma = _try(driver, MemoryKind(device, best, True)) if driver.rdma_supported(device) else "not supported"
    return Handles(answers[HandleType.FABRIC], answers[HandleType.POSIX_FD], answers[HandleType.NONE], rdma)


def _try(driver: VirtualMemoryDriver, kind: MemoryKind) -> str:
    try:
        handle = driver.create(driver.granularity(kind), kind)
        try:
            if kind.handle_type is HandleType.FABRIC:
                driver.export_fabric(handle)
            elif kind.handle_type is HandleType.POSIX_FD:
                os.close(driver.export_fd(handle))
        finally:
            driver.release(handle)
    except DriverError as error:
        return error.code
    return ""


def judge(facts: DeviceFacts, handles: Handles) -> list[Finding]:
    """Of one device."""
    name = f"cuda:{facts.ordinal}"
    major, minor = facts.compute_capability
    findings = [ok(name, f"{facts.name}, {size(facts.total_bytes)}, compute {major}.{minor}, PCI {facts.pci_bus_id}")]
    if not facts.virtual_memory or handles.plain:
        why = handles.plain or "the driver offers no virtual memory"
        findings.append(
            problem(
                f"{name} cumem memory",
                f"refused ({why}): KV pools are plain memory, which other processes can only open by cudaIpc",
                "end what else fills the GPU"
                if "OUT_OF_MEMORY" in why
                else "virtual GPUs and WSL lack it: use whole GPUs",
            )
        )
        return findings
    good = [
        _HANDLE_NAMES[kind]
        for kind, why in ((HandleType.FABRIC, handles.fabric), (HandleType.POSIX_FD, handles.posix_fd))
        if not why
    ]
    if good:
        findings.append(ok(f"{name} cumem memory", f"opens to peers by {' and '.join(good)} (allocated to see)"))
    else:
        findings.append(
            problem(
                f"{name} cumem memory",
                f"cannot be exported (fabric: {handles.fabric}, file descriptor: {handles.posix_fd}): no nvlink lane",
                "update the driver; check that the container's seccomp profile permits passing file descriptors",
            )
        )
    if handles.fabric and not facts.fabric_handles:
        findings.append(ok(f"{name} fabric handles", "not supported by this GPU"))
    elif handles.fabric:
        fix = "nothing on one machine; across an NVLink domain IMEX must run, and its channel be in the container"
        if "NOT_PERMITTED" in handles.fabric:
            fix += " (/dev/nvidia-caps-imex-channels; Kubernetes: a ComputeDomain)"
        text = f"{handles.fabric}, although the driver says that it supports them"
        findings.append(note(f"{name} fabric handles", text, fix))
    if handles.rdma:
        findings.append(
            note(
                f"{name} GPUDirect RDMA",
                f"cumem memory: {handles.rdma}",
                "with RDMA NICs KV would go through host memory: enable GPUDirect RDMA in the driver, or give nodes "
                "--no-enable-cumem-allocator",
            )
        )
    else:
        findings.append(
            ok(
                f"{name} GPUDirect RDMA",
                f"cumem memory: yes; dma-buf: {'yes' if facts.dma_buf else 'no, nvidia_peermem it must be'}",
            )
        )
    if facts.unified_memory:
        findings.append(ok(f"{name} memory", "shared with the host: host copies are not pinned"))
    return findings


def facts() -> dict[str, object]:
    """``gpus``: how many; ``cumem``: whether the first one has such memory."""
    try:
        driver = CudaDriver()
        count = driver.device_count()
        return {"gpus": count, "cumem": bool(count) and not probe(driver, 0).plain}
    except DriverError:
        return {"gpus": 0, "cumem": False}


CHECKS: tuple[Check, ...] = (engines, gpus)
