"""What engines compute on: the GPU that a process sees first, or this machine's cores.

Decided once, by ``up`` and by each node before its engine starts; doctor asks the same question. No torch here. A GPU
that is there and cannot be used is an error with its remedy, never a reason to serve on the cores in silence.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pd_serve.errors import ConfigError
from pd_serve.memory.cuda_driver import CudaDriver, DeviceFacts, reason
from pd_serve.memory.driver import DriverError

log = logging.getLogger(__name__)

FLASHINFER = ((0, 6, 12), (0, 7))  # from, to before: its API changes in minor versions
LEAST_CAPABILITY = (8, 0)  # Ampere
_INSTALL = "pip install 'pd-serve[cuda]'"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # as PCI numbers a vendor, and the kind of a device
_HIDE = {"CUDA_VISIBLE_DEVICES": ("", "-1"), "NVIDIA_VISIBLE_DEVICES": ("none", "void")}  # the second: in containers


@dataclass(frozen=True)
class Choice:
    """``problem``: why a GPU that is there cannot be used, and what to do; else empty. ``why``: empty: it was said."""

    device: str  # "cuda" | "cpu"
    why: str
    problem: str = ""

    def log(self) -> None:
        """A line, unless it was said what to compute on."""
        if self.why:
            log.info("engines compute on %s: %s", "GPUs" if self.device == "cuda" else "the machine's cores", self.why)


@dataclass(frozen=True)
class Libraries:
    """Versions of what the engine needs on a GPU; None: not installed. Nothing is imported to find them."""

    torch: tuple[str, str] | None  # its own, and its CUDA's (empty: built for CPUs)
    triton: str | None
    flashinfer: str | None

    @classmethod
    def installed(cls) -> Libraries:
        return cls(torch_versions(), _version("triton"), _version("flashinfer-python"))

    def problem(self, driver: str) -> str:
        """``driver``: the newest CUDA that it supports."""
        if self.torch is None:
            return f"torch is not installed: {_INSTALL}"
        version, cuda = self.torch
        if not cuda:
            return f"torch {version} is built for CPUs: install the build for CUDA {driver.partition('.')[0]}"
        if int(cuda.partition(".")[0]) > int(driver.partition(".")[0]):
            return (
                f"torch was built for CUDA {cuda}, and the driver supports {driver}: update the driver, or install "
                f"torch for CUDA {driver.partition('.')[0]}"
            )
        missing = [name for name, found in (("triton", self.triton), ("FlashInfer", self.flashinfer)) if found is None]
        if self.flashinfer is None or self.triton is None:
            return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed: {_INSTALL}"
        numbers = tuple(int(part) for part in self.flashinfer.split(".")[:3] if part.isdigit())
        if not FLASHINFER[0] <= numbers < FLASHINFER[1]:
            return f"FlashInfer {self.flashinfer} is not supported: pip install 'flashinfer-python>=0.6.12,<0.7'"
        return ""


def choose(asked: str, look: Callable[[], Choice] | None = None) -> Choice:
    """For a ``--device`` of ``auto`` or one of them. Raises ConfigError."""
    if asked == "cpu":
        return Choice(asked, "")
    found = (look or what_there_is)()
    if asked == "cuda":
        if found.problem or found.device != "cuda":
            raise ConfigError(f"--device cuda: {found.problem or found.why}")
        return Choice(asked, "")
    if found.problem:
        raise ConfigError(
            f"this machine has an NVIDIA GPU that cannot be used: {found.problem}. Or serve on the machine's cores "
            "instead, with --device cpu"
        )
    return found


def what_there_is(
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    make_driver: Callable[[], CudaDriver] = CudaDriver,
    libraries: Callable[[], Libraries] = Libraries.installed,
) -> Choice:
    """``root``: tests build a machine of their own in a directory."""
    environ = os.environ if environ is None else environ
    for variable, hidden in _HIDE.items():
        if environ.get(variable) in hidden:
            return Choice("cpu", f"{variable}={environ[variable]} hides all GPUs")
    try:
        driver = make_driver()
        if not driver.device_count():
            raise DriverError("cuDeviceGetCount", "CUDA_ERROR_NO_DEVICE")
        facts, supports = driver.device_facts(0), driver.version()
    except DriverError as error:
        if not has_gpu(root):
            return Choice("cpu", "there is no NVIDIA GPU")
        return Choice("cpu", "the GPU cannot be used", reason(error))
    problem = _unsupported(facts) or libraries().problem(supports)
    return Choice("cpu" if problem else "cuda", facts.name, problem)


def _unsupported(facts: DeviceFacts) -> str:
    if facts.compute_capability >= LEAST_CAPABILITY:
        return ""
    major, minor = facts.compute_capability
    return (
        f"{facts.name} has compute capability {major}.{minor}, but 8.0 (Ampere) is the least: use a newer GPU "
        "(CUDA_VISIBLE_DEVICES, where there are several)"
    )


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether there is an NVIDIA GPU, be it without a driver, or one that this container was not given."""
    if (root / "dev/nvidiactl").exists():
        return True
    devices = root / "sys/bus/pci/devices"
    return any(
        _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def torch_versions() -> tuple[str, str] | None:
    """torch's, and its CUDA's (empty: built for CPUs); read from a file, because importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]*)? = '([^']+)'", text, re.MULTILINE)
    return version[1] if version else "unknown", cuda[1] if cuda else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
