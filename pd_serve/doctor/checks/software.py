"""Versions, and settings in the environment that change how KV moves."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata

from pd_serve import __version__
from pd_serve import config as settings
from pd_serve.doctor.findings import Finding, broken, note, ok, problem
from pd_serve.doctor.machine import Check, Machine
from pd_serve.errors import ConfigError
from pd_serve.memory import alloc_conf
from pd_serve.memory.choice import torch_versions

_PACKAGES = ("cuda-bindings", "nvidia-ml-py", "numba")  # with one name; the others come in builds
_UCX_HARMFUL = {
    "UCX_TLS": "it restricts what NIXL and ucxx may use; unset it, unless you know that the fastest is in it",
    "UCX_NET_DEVICES": "NIXL and ucxx use these network devices only; leave it out to use all",
    "UCX_MEMTYPE_CACHE": "UCX takes GPU memory for host memory when its cache is wrong; unset it",
}


def versions(machine: Machine) -> list[Finding]:
    findings = [ok("pd-serve", __version__), ok("Python", platform.python_version())]
    findings.append(_torch(machine))
    for name in _PACKAGES:
        try:
            findings.append(ok(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            if name == "numba":
                findings.append(broken(name, "not installed", f"pip install {name}"))
    return findings


def _torch(machine: Machine) -> Finding:
    found = torch_versions()
    if found is None:
        return broken("torch", "not installed", "pip install torch")
    version, cuda = found
    if not cuda and (machine.root / "dev/nvidiactl").exists():
        fix = "install the build of torch for this driver's CUDA, and pip install 'pd-serve[cuda]'"
        return problem("torch", f"{version} is built for CPUs, and there are NVIDIA GPUs here", fix)
    return ok("torch", f"{version}, {'CUDA ' + cuda if cuda else 'CPU build'}")


def node_settings(machine: Machine) -> list[Finding]:
    """Whether nodes started from this environment would get through their settings."""
    given = sorted(name for name in os.environ if name.startswith(settings.PREFIX) and "KEY" not in name)
    try:
        node = settings.load("decode", {})
    except ConfigError as error:
        return [broken("settings", str(error), "mend the variable or the file; pd-serve decode --help lists all")]
    text = f"--transport {node.transport}"
    return [
        ok("settings of nodes", text + (f"; set: {', '.join(given)}" if given else "; no PD_SERVE_* variable is set"))
    ]


def allocator(machine: Machine, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Expandable segments remap memory that peers may have registered."""
    variable, text = alloc_conf.from_environment(environ)
    if not variable:
        return [ok("PyTorch's allocator", "not configured by a variable")]
    if not alloc_conf.has_expandable_segments(text):
        return [ok("PyTorch's allocator", f"{variable}={text}")]
    return [
        note(
            "PyTorch's allocator",
            f"{variable}={text}: torch may remap its memory under a registration; only cumem memory is safe from it",
            f"keep the cumem allocator on (--enable-cumem-allocator), or set {variable}="
            f"{alloc_conf.with_expandable_segments(text, False)}",
        )
    ]


def ucx_variables(machine: Machine, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """UCX reads dozens; those that are set explain many a slow lane."""
    environ = os.environ if environ is None else environ
    found = sorted(name for name in environ if name.startswith("UCX_") and not name.startswith("UCX_LOG"))
    harmless = [f"{name}={environ[name]}" for name in found if name not in _UCX_HARMFUL]
    findings = [note(name, environ[name], _UCX_HARMFUL[name]) for name in found if name in _UCX_HARMFUL]
    if harmless:
        findings.append(ok("UCX variables", ", ".join(harmless)))
    return findings


CHECKS: tuple[Check, ...] = (versions, node_settings, allocator, ucx_variables)
