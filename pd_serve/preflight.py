"""What can be known to be wrong before anything is started: files, libraries, and memory that settings name.

Called by ``up``, before its processes, and by each node, before its engine.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pd_serve.config import EngineSettings
from pd_serve.errors import ConfigError
from pd_serve.values import amount, readable_size

_LIBRARIES = {"ucx": ("ucxx",), "nixl": ("nixl_cu13", "nixl_cu12")}
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check(settings: EngineSettings, *, nodes: int = 1) -> None:
    """Raises ConfigError. ``nodes``: how many are started here with these settings, with ``device`` resolved."""
    settings.node_secret()
    settings.nixl_backend_options()
    libraries = _LIBRARIES.get(settings.transport, ())
    if libraries and not any(map(importlib.util.find_spec, libraries)):
        raise ConfigError(
            f"--transport {settings.transport} needs {libraries[0]}, which is not installed: pip install "
            f"'pd-serve{'[ucx]' if settings.transport == 'ucx' else ''}', or use --transport auto"
        )
    settings.check_weight_offload()
    if settings.device == "cuda":
        _check_offload(settings, nodes)
        return
    each_bytes, present = settings.kv_cache_bytes, memory_bytes()
    wanted = each_bytes * nodes
    if wanted > present:
        each = f"{nodes} nodes with {readable_size(each_bytes)} each" if nodes > 1 else "it"
        raise ConfigError(
            f"--kv-cache-memory {readable_size(each_bytes)} is more than there is: {each} would need "
            f"{readable_size(wanted)}, and this machine or container has {readable_size(present)}"
        )


def _check_offload(settings: EngineSettings, nodes: int) -> None:
    """Where a size is asked for; other amounts are known when the model is."""
    wanted, ranks = amount(settings.weight_offload_size or "1layer"), nodes * settings.tp
    size, present = int(wanted.number) * ranks, memory_bytes()
    if wanted.unit == "bytes" and size > present:
        raise ConfigError(
            f"--weight-offload-size {settings.weight_offload_size} is more than there is: {ranks} GPUs would need "
            f"{readable_size(size)} of the host, and this machine or container has {readable_size(present)}"
        )


def memory_bytes(*, free: bool = False) -> int:
    """What this machine has, or this container may use of it. ``free``: that nobody has taken, or only caches files."""
    name = "MemAvailable:" if free else "MemTotal:"
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(name)]
    for path in _CGROUP_LIMITS:
        try:
            found.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return min(found)
