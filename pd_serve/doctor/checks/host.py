"""The machine and its container: locked and shared memory, cgroups, huge pages, reading a neighbour's memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from pathlib import Path

from pd_serve.doctor.findings import Finding, note, ok, problem, size
from pd_serve.doctor.machine import Check, Machine

_CAP_IPC_LOCK = 14  # linux/capability.h
_PID_NAMESPACE_OF_THE_HOST = "pid:[4026531836]"  # PROC_PID_INIT_INO
_SMALL_SHM_BYTES = 1 << 30  # container runtimes give 64 MiB unless asked
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def container(machine: Machine) -> list[Finding]:
    kinds = {
        "Docker": (machine.root / ".dockerenv").exists(),
        "Podman": (machine.root / "run/.containerenv").exists(),
        "Kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "Slurm": "SLURM_JOB_ID" in os.environ,
    }
    found = [kind for kind, there in kinds.items() if there]
    own = machine.link("proc/self/ns/pid") not in ("", _PID_NAMESPACE_OF_THE_HOST)
    findings = [ok("kernel", platform.release())]
    if found:
        findings.append(ok("runs under", ", ".join(found)))
    if own:
        findings.append(
            note(
                "PID namespace",
                "its own: nodes in other containers of this host cannot use CMA or UCX's cuda_ipc with each other",
                "the nvlink lane only needs a shared directory for its sockets; for the others share the PID namespace "
                "(Docker --pid=host, Kubernetes hostPID or shareProcessNamespace)",
            )
        )
    else:
        findings.append(ok("PID namespace", "the host's"))
    return findings


def locked_memory(machine: Machine, limit: int | None = None) -> list[Finding]:
    """``limit``: in bytes, for tests; else this process's."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if limit == resource.RLIM_INFINITY:
        return [ok("locked memory (ulimit -l)", "unlimited")]
    if _capable(machine, _CAP_IPC_LOCK):
        return [ok("locked memory (ulimit -l)", f"{size(limit)}, but this process has CAP_IPC_LOCK")]
    if not any(machine.entries("sys/class/infiniband")):
        return [ok("locked memory (ulimit -l)", f"{size(limit)}; it matters with RDMA devices only")]
    return [
        problem(
            "locked memory (ulimit -l)",
            f"{size(limit)}: a KV pool larger than that cannot be registered with the RDMA devices",
            "ulimit -l unlimited (systemd LimitMEMLOCK=infinity, Docker --ulimit memlock=-1, Slurm "
            "PropagateResourceLimitsExcept=MEMLOCK; in Kubernetes the container runtime's unit, or add IPC_LOCK)",
        )
    ]


def shared_memory(machine: Machine) -> list[Finding]:
    path = machine.root / "dev/shm"
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return [problem("/dev/shm", str(error.strerror), "mount a tmpfs there; NIXL and UCX keep their queues in it")]
    total, free = stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail
    text = f"{size(total)}, {size(free)} free"
    if total < _SMALL_SHM_BYTES:
        return [
            note(
                "/dev/shm", text, "enlarge it (Docker --shm-size=8g; Kubernetes an emptyDir with medium: Memory there)"
            )
        ]
    if free < total // 50:
        return [problem("/dev/shm", text, "remove what dead processes left there (ls -l /dev/shm)")]
    return [ok("/dev/shm", text)]


def reading_neighbours(machine: Machine) -> list[Finding]:
    """CMA (process_vm_readv), really tried: a child reads its parent, as one node reads another."""
    scope = machine.text("proc/sys/kernel/yama/ptrace_scope")
    refused = _read_parent()
    if not refused:
        return [ok("reading a neighbour's memory (CMA)", "permitted" + (f" (ptrace_scope {scope})" if scope else ""))]
    return [
        note(
            "reading a neighbour's memory (CMA)",
            f"refused ({refused}{f', ptrace_scope {scope}' if scope else ''}): KV in host memory is copied twice",
            "sysctl kernel.yama.ptrace_scope=0, or the capability SYS_PTRACE (Docker --cap-add SYS_PTRACE); some "
            "seccomp profiles forbid process_vm_readv",
        )
    ]


def memory_limit(machine: Machine) -> list[Finding]:
    installed = _meminfo(machine).get("MemTotal", 0)
    limits = [v for v in _cgroup_values(machine, "memory", "memory.max", "memory.limit_in_bytes") if v.isdigit()]
    limit = min((int(v) for v in limits), default=_NO_LIMIT_BYTES)
    if limit >= min(installed or _NO_LIMIT_BYTES, _NO_LIMIT_BYTES):
        return [ok("memory", f"{size(installed)}, no cgroup limit")]
    return [ok("memory", f"{size(limit)} of {size(installed)} by cgroup; weights and pools of all nodes must fit")]


def cpu_limit(machine: Machine) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    quotas = []
    for value in _cgroup_values(machine, "cpu", "cpu.max", ""):
        quota, _, period = value.partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    for directory in _cgroup_directories(machine, "cpu"):  # version 1 has two files
        quota, period = machine.text(directory / "cpu.cfs_quota_us"), machine.text(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    if quotas and min(quotas) < cores:
        return [
            note(
                "CPU",
                f"{cores} cores, of which a cgroup grants {min(quotas):g}: threads beyond that are paused in mid-step",
                "raise the CPU limit to a whole number of cores, and give nodes --threads and --cpus to match",
            )
        ]
    return [ok("CPU", f"{cores} of {os.cpu_count()} cores")]


def huge_pages(machine: Machine) -> list[Finding]:
    words = machine.text("sys/kernel/mm/transparent_hugepage/enabled")
    chosen = words.partition("[")[2].partition("]")[0]
    reserved = _meminfo(machine, "HugePages_Total").get("HugePages_Total", 0)
    more = f"; {reserved} reserved ones are of no use to pd-serve" if reserved else ""
    if chosen in ("always", "madvise"):
        return [ok("transparent huge pages", chosen + more)]
    return [
        note(
            "transparent huge pages",
            (chosen or "not offered") + more,
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: host memory is registered and copied faster",
        )
    ]


def numa(machine: Machine) -> list[Finding]:
    nodes = [p for p in machine.entries("sys/devices/system/node") if p.name[:4] == "node" and p.name[4:].isdigit()]
    if len(nodes) <= 1:
        return []
    text = ", ".join(f"node {p.name[4:]}: cores {machine.text(p / 'cpulist') or 'none'}" for p in nodes)
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        fix = "bind a node to the cores beside its GPU and NIC with --cpus (nvidia-smi topo -m shows which)"
        return [note("NUMA", text, fix)]
    return [ok("NUMA", text)]


def _read_parent() -> str:
    """Empty when a child can read its parent's memory, else the error."""
    libc = ctypes.CDLL(None, use_errno=True)

    class Span(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

    secret, target = ctypes.create_string_buffer(b"pd-serve"), ctypes.create_string_buffer(8)
    theirs, ours = Span(ctypes.addressof(secret), 8), Span(ctypes.addressof(target), 8)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        count = libc.process_vm_readv(parent, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        os._exit(0 if count == 8 else ctypes.get_errno() or 255)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "" if status == 0 else os.strerror(status)


def _capable(machine: Machine, capability: int) -> bool:
    for line in machine.text("proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def _meminfo(machine: Machine, *plain: str) -> dict[str, int]:
    """Bytes; counts for the names in ``plain``."""
    values = {}
    for line in machine.text("proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[0] if rest.split() else ""
        if number.isdigit():
            values[name] = int(number) * (1 if name in plain else 1024)
    return values


def _cgroup_directories(machine: Machine, controller: str) -> list[Path]:
    """This process's group and its ancestors, for version 1 and 2."""
    directories = []
    for line in machine.text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = machine.root / "sys/fs/cgroup" / controller if controllers else machine.root / "sys/fs/cgroup"
        parts = Path(path.lstrip("/")).parts
        directories += [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
    return directories


def _cgroup_values(machine: Machine, controller: str, *names: str) -> list[str]:
    files = [directory / name for directory in _cgroup_directories(machine, controller) for name in names if name]
    return [text for file in files if (text := machine.text(file))]


CHECKS: tuple[Check, ...] = (
    container,
    cpu_limit,
    numa,
    memory_limit,
    locked_memory,
    shared_memory,
    huge_pages,
    reading_neighbours,
)
