"""RDMA devices, from sysfs, and whether this process may use them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pd_serve.doctor.findings import Finding, note, ok, problem
from pd_serve.doctor.machine import Check, Machine

_NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
_IN_CONTAINERS = (
    "give the container the device files: Docker --device=/dev/infiniband, Kubernetes an RDMA device plugin"
)


@dataclass(frozen=True)
class Port:
    device: str
    number: str
    state: str  # ACTIVE, DOWN, INIT ...
    rate: str  # "400 Gb/sec (4X NDR)"
    link_layer: str
    gids: tuple[str, ...]  # with their types, where there are any
    network: str  # interface


def ports(machine: Machine) -> list[Port]:
    """What sysfs says."""
    found = []
    for device in machine.entries("sys/class/infiniband"):
        network = ", ".join(path.name for path in machine.entries(device / "device/net"))
        for port in machine.entries(device / "ports"):
            state = machine.text(port / "state").rpartition(":")[2].strip()
            found.append(
                Port(
                    device.name,
                    port.name,
                    state or "unknown",
                    machine.text(port / "rate"),
                    machine.text(port / "link_layer") or "unknown",
                    _gids(machine, port),
                    network,
                )
            )
    return found


def _gids(machine: Machine, port: Path) -> tuple[str, ...]:
    gids = []
    for entry in machine.entries(port / "gids"):
        gid = machine.text(entry)
        if gid and gid != _NO_GID:
            kind = machine.text(port / "gid_attrs/types" / entry.name)
            gids.append(f"{gid} ({kind})" if kind else gid)
    return tuple(gids)


def devices(machine: Machine) -> list[Finding]:
    found = ports(machine)
    if not found:
        return [
            note(
                "RDMA devices",
                "none: between machines KV would travel over TCP",
                f"nothing, if all nodes are on this machine; else {_IN_CONTAINERS}",
            )
        ]
    findings = [_judge(port) for port in found]
    if not any(port.state == "ACTIVE" for port in found):
        findings.append(
            problem(
                "RDMA ports",
                "none is active: between machines KV would travel over TCP",
                "check cables, the switch ports and, with InfiniBand, the subnet manager (ibstat, rdma link)",
            )
        )
    return findings


def _judge(port: Port) -> Finding:
    name = f"{port.device} port {port.number}"
    details = [port.state, port.rate, port.link_layer, port.network]
    text = ", ".join(part for part in details if part)
    if port.state != "ACTIVE":
        return note(name, text, "nothing, if this port is not meant for KV; else rdma link, ibstat")
    if port.link_layer == "Ethernet" and not any("RoCE v2" in gid for gid in port.gids):
        return problem(
            name,
            f"{text}: no RoCE v2 address, so it cannot be routed",
            "give its interface an IP address, in the container's network namespace too; check show_gids",
        )
    return ok(name, f"{text}, {len(port.gids)} GIDs" + (f", first {port.gids[0]}" if port.gids else ""))


def access(machine: Machine) -> list[Finding]:
    """Sysfs is the host's: a container sees devices that it may not open."""
    if not machine.entries("sys/class/infiniband"):
        return []
    files = [path for path in machine.entries("dev/infiniband") if path.name.startswith("uverbs")]
    if not files:
        return [problem("/dev/infiniband", "there are no uverbs files, so no device can be opened", _IN_CONTAINERS)]
    closed = [path.name for path in files if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        return [
            problem("/dev/infiniband", f"{', '.join(closed)} cannot be opened", "give this user read and write access")
        ]
    return [ok("/dev/infiniband", ", ".join(path.name for path in files))]


def gpu_direct(machine: Machine) -> list[Finding]:
    """Where there is no peer memory module, dma-buf must do; the GPU section says whether the driver offers it."""
    if not machine.entries("sys/class/infiniband"):
        return []
    modules = [name for name in ("nvidia_peermem", "nv_peer_mem") if (machine.root / "sys/module" / name).exists()]
    if modules:
        return [ok("GPUDirect RDMA module", ", ".join(modules))]
    if not (machine.root / "sys/module/nvidia").exists():
        return []
    return [
        note(
            "GPUDirect RDMA module",
            "nvidia_peermem is not loaded; dma-buf is used where driver and kernel have it",
            "modprobe nvidia-peermem on the host, unless the GPU section says that dma-buf is supported",
        )
    ]


CHECKS: tuple[Check, ...] = (devices, access, gpu_direct)
