"""ucxx or ucx-py, for the ucx lane, and what its UCX can use here. It is an extra: NIXL does the same work."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata

from pd_serve.doctor import uct
from pd_serve.doctor.checks import nixl
from pd_serve.doctor.findings import Finding, note, ok, problem
from pd_serve.doctor.machine import Check, Machine

_MODULES = {"ucxx": ("ucxx-cu13", "ucxx-cu12"), "ucp": ("ucx-py-cu12", "ucx-py-cu11")}


def library(machine: Machine) -> list[Finding]:
    name = next((name for name in _MODULES if importlib.util.find_spec(name) is not None), None)
    if name is None:
        return [ok("ucxx", "not installed; it is only needed where NIXL cannot be used (pip install 'pd-serve[ucx]')")]
    versions = [f"{package} {version}" for package in _MODULES[name] if (version := _version(package))]
    try:
        importlib.import_module(name)
    except Exception as error:
        fix = "install the build for this driver's CUDA (ucxx-cu12, ucxx-cu13), or remove it"
        return [problem(name, f"does not import: {error}", fix)]
    findings = [ok(name, ", ".join(versions) or "installed")]
    libuct, libucp = uct.loaded("libuct"), uct.loaded("libucp")
    if libuct is None or libucp is None:
        return [*findings, note("UCX", "its library is not loaded", "")]
    findings.append(ok("UCX", f"{uct.version(libucp)}"))
    return findings + nixl.judge(uct.resources(libuct), machine)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


CHECKS: tuple[Check, ...] = (library,)
