"""NIXL: whether it starts, which backends it brings, and what the UCX inside it can use here."""

from __future__ import annotations

import os
from importlib import metadata

from pd_serve.doctor import uct
from pd_serve.doctor.findings import Finding, broken, note, ok, problem
from pd_serve.doctor.machine import Check, Machine
from pd_serve.errors import TransferError

# What stands behind a lane between two machines, within one, and between two GPUs.
_RDMA = ("rc_mlx5", "dc_mlx5", "ud_mlx5", "rc_verbs", "ud_verbs", "srd")
_SHARED = ("cma", "posix", "sysv", "xpmem", "knem")


def agent(machine: Machine) -> list[Finding]:
    from pd_serve.transfer.nixl import load_bindings

    try:
        nixl = load_bindings()
    except TransferError as error:
        return [broken("NIXL", str(error), "pip install nixl-cu13")]
    build = nixl.__name__.partition(".")[0].replace("_", "-")
    findings = [ok("NIXL", f"{metadata.version(build)}, the build {build}")]
    config = nixl.nixlAgentConfig()
    config.useProgThread = False
    agent = nixl.nixlAgent(f"doctor-{os.getpid()}", config)
    findings.append(ok("backends", ", ".join(agent.getAvailPlugins()) or "none"))
    try:
        agent.createBackend("UCX", {})
    except Exception as error:
        return [
            *findings,
            broken("UCX backend", f"does not start: {error}", "run again with UCX_LOG_LEVEL=info for the reason"),
        ]
    libuct, libucp = uct.loaded("libuct"), uct.loaded("libucp")
    if libuct is None or libucp is None:
        return [*findings, ok("UCX backend", "starts")]
    findings.append(ok("UCX backend", f"starts; UCX {uct.version(libucp)}"))
    return findings + judge(uct.resources(libuct), machine)


def judge(found: uct.Resources, machine: Machine) -> list[Finding]:
    """``found``: of any UCX library, also ucxx's."""
    lines = [
        f"{name} ({', '.join(sorted(set(devices)))})" for name, devices in found.transports.items() if name != "self"
    ]
    findings = [ok("UCX transports", "; ".join(lines) or "none")]
    rdma = [name for name in found.transports if name.startswith(_RDMA)]
    if machine.entries("sys/class/infiniband") and not rdma:
        why = (
            "was built with InfiniBand support, but opens no device"
            if "ib" in found.components
            else "has no InfiniBand support"
        )
        findings.append(
            problem(
                "UCX and RDMA",
                f"this UCX {why}: between machines KV would go over TCP",
                "see the RDMA section for device files and ports; else use the ucx or nixl build that has it",
            )
        )
    if not any(name in found.transports for name in _SHARED):
        findings.append(
            problem(
                "UCX and shared memory",
                "none of its transports works: inside this machine KV would go over TCP",
                "see the host section: /dev/shm and CMA; unset UCX_TLS",
            )
        )
    gpu = (machine.root / "dev/nvidiactl").exists()
    if gpu and "cuda_copy" not in found.transports:
        findings.append(
            problem(
                "UCX and CUDA",
                "no CUDA transport: GPU memory cannot be registered",
                "install the build for this driver's CUDA (nixl-cu12, nixl-cu13)",
            )
        )
    elif gpu and "cuda_ipc" not in found.transports:
        findings.append(note("UCX and CUDA", "no cuda_ipc: this UCX cannot use NVLink; the nvlink lane can", ""))
    return findings


CHECKS: tuple[Check, ...] = (agent,)
