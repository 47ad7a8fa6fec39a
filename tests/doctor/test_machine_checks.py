"""Checks of files, on machines made of files."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pd_serve.doctor.checks import host, rdma, software
from pd_serve.doctor.findings import Finding, Level
from pd_serve.doctor.machine import Machine


def build(root: Path, files: dict[str, str]) -> Machine:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Machine(root=root)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# --- cgroups, in both versions


def test_cgroup_limits_of_version_2_count_ancestors(tmp_path: Path) -> None:
    machine = build(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod1",
            "proc/meminfo": "MemTotal:       67108864 kB",
            "sys/fs/cgroup/kubepods/memory.max": "8589934592\n",
            "sys/fs/cgroup/kubepods/pod1/memory.max": "max\n",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "50000 100000\n",
        },
    )
    assert only(host.memory_limit(machine)).value.startswith("8 GiB of 64 GiB by cgroup")
    found = only(host.cpu_limit(machine))
    assert found.level is Level.NOTE and "grants 0.5" in found.value and "--threads" in found.fix


def test_cgroup_limits_of_version_1(tmp_path: Path) -> None:
    machine = build(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n0::/",
            "proc/meminfo": "MemTotal:       67108864 kB",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1073741824",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
        },
    )
    assert only(host.memory_limit(machine)).value.startswith("1 GiB of 64 GiB")
    assert "grants 0.5" in only(host.cpu_limit(machine)).value


def test_without_limits_nothing_is_said_about_them(tmp_path: Path) -> None:
    machine = build(tmp_path, {"proc/self/cgroup": "0::/", "proc/meminfo": "MemTotal: 1048576 kB"})
    assert only(host.memory_limit(machine)).value == "1 GiB, no cgroup limit"
    assert only(host.cpu_limit(machine)).level is Level.OK


# --- limits of the host


def test_locked_memory_is_a_problem_only_with_rdma(tmp_path: Path) -> None:
    limit = 8 << 20
    machine = build(tmp_path, {"proc/self/status": "CapEff:\t0000000000000000\n"})
    assert only(host.locked_memory(machine, limit)).level is Level.OK
    machine = build(tmp_path, {"sys/class/infiniband/mlx5_0/node_type": "1: CA"})
    found = only(host.locked_memory(machine, limit))
    assert found.level is Level.PROBLEM and "ulimit -l unlimited" in found.fix and not found.broken
    machine = build(tmp_path, {"proc/self/status": f"CapEff:\t{1 << 14:016x}\n"})
    assert "CAP_IPC_LOCK" in only(host.locked_memory(machine, limit)).value
    assert only(host.locked_memory(machine, resource.RLIM_INFINITY)).value == "unlimited"


def test_huge_pages(tmp_path: Path) -> None:
    enabled = "sys/kernel/mm/transparent_hugepage/enabled"
    machine = build(tmp_path, {enabled: "always [madvise] never", "proc/meminfo": "HugePages_Total:      64"})
    found = only(host.huge_pages(machine))
    assert found.level is Level.OK and found.value.startswith("madvise; 64 reserved")
    found = only(host.huge_pages(build(tmp_path, {enabled: "always madvise [never]"})))
    assert found.level is Level.NOTE and "echo madvise" in found.fix


def test_shared_memory_that_is_missing(tmp_path: Path) -> None:
    found = only(host.shared_memory(Machine(root=tmp_path)))
    assert found.level is Level.PROBLEM and "tmpfs" in found.fix


def test_numa_nodes_ask_for_binding(tmp_path: Path) -> None:
    nodes = {f"sys/devices/system/node/node{n}/cpulist": f"{n * 8}-{n * 8 + 7}" for n in range(2)}
    found = only(host.numa(build(tmp_path, nodes)))
    assert "node 1: cores 8-15" in found.value
    assert host.numa(Machine(root=tmp_path / "elsewhere")) == []


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    machine = build(tmp_path, {".dockerenv": ""})
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
    found = {finding.what: finding for finding in host.container(machine)}
    assert found["runs under"].value == "Docker, Kubernetes"
    assert found["PID namespace"].level is Level.NOTE and "hostPID" in found["PID namespace"].fix


def test_a_child_reads_its_parent_where_that_is_permitted() -> None:
    found = only(host.reading_neighbours(Machine()))
    assert found.level in (Level.OK, Level.NOTE)


# --- RDMA


def port(device: str, state: str, link_layer: str, gids: dict[str, str]) -> dict[str, str]:
    base = f"sys/class/infiniband/{device}/ports/1"
    files = {f"{base}/state": state, f"{base}/rate": "400 Gb/sec (4X NDR)", f"{base}/link_layer": link_layer}
    for index, (gid, kind) in enumerate(gids.items()):
        files |= {f"{base}/gids/{index}": gid, f"{base}/gid_attrs/types/{index}": kind}
    return files


def test_no_rdma_device_is_a_note(tmp_path: Path) -> None:
    found = only(rdma.devices(Machine(root=tmp_path)))
    assert found.level is Level.NOTE and "TCP" in found.value
    assert rdma.access(Machine(root=tmp_path)) == rdma.gpu_direct(Machine(root=tmp_path)) == []


def test_rdma_ports_are_judged_one_by_one(tmp_path: Path) -> None:
    files = port("mlx5_0", "4: ACTIVE\n", "InfiniBand\n", {"fe80::1": "IB/RoCE v1"})
    files |= port("mlx5_1", "1: DOWN\n", "InfiniBand\n", {})
    files |= port("mlx5_2", "4: ACTIVE\n", "Ethernet\n", {"fe80::2": "IB/RoCE v1"})
    files |= port("mlx5_3", "4: ACTIVE\n", "Ethernet\n", {"fe80::3": "RoCE v2", rdma._NO_GID: ""})
    files["sys/class/infiniband/mlx5_3/device/net/eth2/mtu"] = "9000"
    levels = {finding.what: finding for finding in rdma.devices(build(tmp_path, files))}
    assert levels["mlx5_0 port 1"].level is Level.OK
    assert "400 Gb/sec" in levels["mlx5_0 port 1"].value and "fe80::1" in levels["mlx5_0 port 1"].value
    assert levels["mlx5_1 port 1"].level is Level.NOTE
    assert levels["mlx5_2 port 1"].level is Level.PROBLEM and "no RoCE v2" in levels["mlx5_2 port 1"].value
    assert levels["mlx5_3 port 1"].level is Level.OK
    assert "eth2" in levels["mlx5_3 port 1"].value and "1 GIDs" in levels["mlx5_3 port 1"].value
    assert "RDMA ports" not in levels


def test_devices_that_this_container_may_not_open(tmp_path: Path) -> None:
    machine = build(tmp_path, port("mlx5_0", "1: DOWN", "InfiniBand", {}))
    assert [finding.level for finding in rdma.devices(machine)] == [Level.NOTE, Level.PROBLEM]
    found = only(rdma.access(machine))
    assert found.level is Level.PROBLEM and "--device=/dev/infiniband" in found.fix
    machine = build(tmp_path, {"dev/infiniband/uverbs0": "", "sys/module/nvidia/refcnt": "1"})
    assert only(rdma.access(machine)).level is Level.OK
    assert only(rdma.gpu_direct(machine)).level is Level.NOTE
    machine = build(tmp_path, {"sys/module/nvidia_peermem/refcnt": "1"})
    assert only(rdma.gpu_direct(machine)).level is Level.OK


# --- settings


def test_expandable_segments_are_noticed_however_they_are_written() -> None:
    machine = Machine()
    assert only(software.allocator(machine, {})).level is Level.OK
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        found = only(software.allocator(machine, {variable: "max_split_size_mb:64, expandable_segments: true"}))
        assert found.level is Level.NOTE and f"{variable}=max_split_size_mb:64,expandable_segments:False" in found.fix
    assert only(software.allocator(machine, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"})).level is Level.OK


def test_ucx_variables_that_hurt_are_notes() -> None:
    found = software.ucx_variables(
        Machine(), {"UCX_TLS": "tcp", "UCX_IB_GPU_DIRECT_RDMA": "y", "UCX_LOG_LEVEL": "info"}
    )
    assert [(finding.level, finding.what) for finding in found] == [
        (Level.NOTE, "UCX_TLS"),
        (Level.OK, "UCX variables"),
    ]
    assert found[1].value == "UCX_IB_GPU_DIRECT_RDMA=y"


def test_settings_that_nodes_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_TRANSPORT", "pigeon")
    found = only(software.node_settings(Machine()))
    assert found.broken and "pigeon" in found.value


def test_versions_are_read_without_importing_torch() -> None:
    found = {finding.what: finding for finding in software.versions(Machine())}
    assert found["torch"].level is Level.OK and found["torch"].value[0].isdigit()
    assert not found["numba"].broken
