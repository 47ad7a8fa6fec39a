"""NVLink between the GPUs of this machine, the fabric they belong to (MNNVL), and IMEX; from NVML."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from pd_serve.config import PREFIX
from pd_serve.doctor.findings import Finding, note, ok, problem
from pd_serve.doctor.machine import Check, Machine
from pd_serve.errors import TransferError
from pd_serve.transfer.nvlink.directory import socket_directory

_CHANNELS = "dev/nvidia-caps-imex-channels"
FABRIC_STATES = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}


@dataclass(frozen=True)
class Gpu:
    """What NVML says of one GPU; links that do not exist are in neither count."""

    index: int
    name: str
    links_up: int
    links_down: int
    link_mb_per_s: int  # of one link, one direction; 0: not told
    to_switch: bool
    fabric_state: int  # of FABRIC_STATES
    fabric_status: int  # an NVML return code
    clique: int
    cluster: str  # UUID in hex; zeros: none
    mig: bool
    persistence: bool


@dataclass(frozen=True)
class Facts:
    driver: str
    gpus: tuple[Gpu, ...]
    peers: dict[tuple[int, int], tuple[bool, bool]]  # (nvlink, read) of each ordered pair
    channels: tuple[str, ...]  # IMEX channels that this process sees


def links(machine: Machine) -> list[Finding]:
    try:
        import pynvml
    except ImportError:
        if not (machine.root / "dev/nvidiactl").exists():
            return []
        return [note("NVML", "nvidia-ml-py is not installed: links cannot be looked at", "pip install nvidia-ml-py")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if not (machine.root / "dev/nvidiactl").exists():
            return [ok("NVLink", "no NVIDIA driver")]
        return [problem("NVML", str(error), "check that nvidia-smi works here, in this container")]
    try:
        return judge(read(pynvml, tuple(path.name for path in machine.entries(_CHANNELS))))
    finally:
        pynvml.nvmlShutdown()


def read(nvml: Any, channels: tuple[str, ...]) -> Facts:
    """``nvml``: the module pynvml, initialised."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    peers = {
        (a, b): (_peer(nvml, one, other, "NVLINK"), _peer(nvml, one, other, "READ"))
        for a, one in enumerate(handles)
        for b, other in enumerate(handles)
        if a != b
    }
    gpus = tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles))
    return Facts(_text(nvml.nvmlSystemGetDriverVersion()), gpus, peers, channels)


def _peer(nvml: Any, one: Any, other: Any, what: str) -> bool:
    index = getattr(nvml, f"NVML_P2P_CAPS_INDEX_{what}")
    if isinstance(index, tuple):  # nvidia-ml-py 13.615 has a comma too many behind one of them
        index = index[0]
    with contextlib.suppress(nvml.NVMLError):
        return bool(nvml.nvmlDeviceGetP2PStatus(one, other, index) == nvml.NVML_P2P_STATUS_OK)
    return False


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    up = down = speed = 0
    to_switch = False
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
        except nvml.NVMLError:
            continue  # this GPU has no such link
        up, down = up + active, down + (not active)
        if active:
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
                to_switch |= kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        value = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])[0]
        speed = int(value.value.uiVal) if value.nvmlReturn == nvml.NVML_SUCCESS else 0
    state = status = clique = 0
    cluster = ""
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        info = nvml.c_nvmlGpuFabricInfoV_t()
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, nvml.byref(info))
        state, status, clique = int(info.state), int(info.status), int(info.cliqueId)
        cluster = bytes(info.clusterUuid).hex()
    mig = persistence = False
    with contextlib.suppress(nvml.NVMLError):
        mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    with contextlib.suppress(nvml.NVMLError):
        persistence = nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_ENABLED
    name = _text(nvml.nvmlDeviceGetName(handle))
    return Gpu(index, name, up, down, speed, to_switch, state, status, clique, cluster, mig, persistence)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def judge(facts: Facts) -> list[Finding]:
    findings = [ok("NVIDIA driver", facts.driver)]
    for gpu in facts.gpus:
        findings.append(_judge_links(gpu))
        if gpu.mig:
            findings.append(
                note(
                    f"GPU {gpu.index}",
                    "MIG is on: its slices have no NVLink",
                    "use whole GPUs for nodes that exchange KV",
                )
            )
    if len(facts.gpus) > 1:
        findings.append(_judge_peers(facts))
    return findings + _judge_fabric(facts)


def _judge_links(gpu: Gpu) -> Finding:
    name = f"GPU {gpu.index} NVLink"
    if not gpu.links_up + gpu.links_down:
        return ok(name, f"{gpu.name} has none")
    rate = f", {gpu.links_up * gpu.link_mb_per_s / 1000:g} GB/s each way in all" if gpu.link_mb_per_s else ""
    other = "NVSwitch" if gpu.to_switch else "GPUs"
    text = f"{gpu.links_up} of {gpu.links_up + gpu.links_down} links up{rate}, to {other}"
    if not gpu.links_up:
        return problem(
            name,
            f"none of {gpu.links_down} links is up: KV would go over PCIe",
            "nvidia-smi nvlink -s; with NVSwitch the fabric manager must run; virtual machines must be given the links",
        )
    if gpu.links_down:
        return note(
            name, text, "nvidia-smi nvlink -s shows which links are down; nothing, if the board does not wire them"
        )
    return ok(name, text)


def _judge_peers(facts: Facts) -> Finding:
    missing = [f"{a}-{b}" for (a, b), (_, read) in facts.peers.items() if a < b and not read]
    by_link = sum(nvlink for nvlink, _ in facts.peers.values())
    what = "reading each other's memory"
    if missing:
        return problem(
            what,
            f"GPUs {', '.join(missing)} cannot: KV between them goes through host memory",
            "place nodes on GPUs that can (nvidia-smi topo -p2p r); else PCIe access control (ACS) or virtualisation "
            "is in the way",
        )
    if by_link == len(facts.peers):
        return ok(what, "every pair, over NVLink")
    slow = [f"{a}-{b}" for (a, b), (nvlink, _) in facts.peers.items() if a < b and not nvlink]
    return note(
        what, f"over PCIe between {', '.join(slow)}", "place prefill and decode nodes on GPUs that NVLink joins"
    )


def _judge_fabric(facts: Facts) -> list[Finding]:
    """NVLink across machines (MNNVL): the fabric must be up, and IMEX must have given this process a channel."""
    members = [gpu for gpu in facts.gpus if gpu.fabric_state == 3 and gpu.cluster.strip("0")]
    stuck = [gpu for gpu in facts.gpus if gpu.fabric_state in (1, 2) or (gpu.fabric_state == 3 and gpu.fabric_status)]
    findings = []
    if stuck:
        states = ", ".join(f"GPU {gpu.index}: {FABRIC_STATES.get(gpu.fabric_state, '?')}" for gpu in stuck)
        findings.append(
            problem(
                "NVLink fabric",
                f"{states}, status {stuck[0].fabric_status}",
                "start the fabric manager; nvidia-smi -q shows its state",
            )
        )
    if not members:
        if not stuck:
            findings.append(ok("NVLink across machines (MNNVL)", "not offered by these GPUs"))
        return findings
    domain = ", ".join(sorted({f"cluster {gpu.cluster}, clique {gpu.clique}" for gpu in members}))
    findings.append(ok("NVLink across machines (MNNVL)", domain))
    if facts.channels:
        findings.append(ok("IMEX channels", ", ".join(facts.channels)))
    else:
        findings.append(
            problem(
                "IMEX channels",
                "none: memory cannot be opened to the other machines of the domain",
                "start nvidia-imex on all of them and give the container a channel (Kubernetes: a ComputeDomain claim; "
                "Docker --device=/dev/nvidia-caps-imex-channels/channel0)",
            )
        )
    return findings


def sockets(machine: Machine) -> list[Finding]:
    """Where nodes of one machine hand each other the file descriptors of their memory."""
    if not (machine.root / "dev/nvidiactl").exists():
        return []
    setting = os.environ.get(PREFIX + "NVLINK_SOCKET_DIR", "")
    try:
        path = socket_directory(setting)
    except TransferError as error:
        return [problem("directory for sockets", str(error), "name one that exists and this user may write to")]
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        fix = "create it, writable for this user; in Kubernetes mount the same volume in both pods"
        return [problem("directory for sockets", f"{path} cannot be written to", fix)]
    hint = "" if setting else "; nodes in other containers need a common one (--nvlink-socket-dir)"
    return [ok("directory for sockets", f"{path}{hint}")]


def facts() -> dict[str, object]:
    """``nvlinked``: whether any two GPUs are."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return {"nvlinked": any(nvlink for nvlink, _ in read(pynvml, ()).peers.values())}
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return {"nvlinked": False}


CHECKS: tuple[Check, ...] = (links, sockets)
