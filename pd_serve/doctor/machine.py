"""What checks are given: the settings, and where the machine's files are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pd_serve.config import DoctorConfig
from pd_serve.doctor.findings import Finding


@dataclass(frozen=True)
class Machine:
    """``root``: tests build a machine of their own in a directory."""

    config: DoctorConfig = field(default_factory=DoctorConfig)
    root: Path = Path("/")

    def text(self, path: str | Path) -> str:
        """A file's content without the white space around it; empty where it cannot be read."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.root / path).read_text(encoding="utf-8").strip()
        return ""

    def link(self, path: str | Path) -> str:
        """What a symbolic link says; empty where there is none."""
        with contextlib.suppress(OSError):
            return str((self.root / path).readlink())
        return ""

    def entries(self, path: str | Path) -> list[Path]:
        """A directory's entries in order; none where it cannot be read."""
        with contextlib.suppress(OSError):
            return sorted((self.root / path).iterdir())
        return []


Check = Callable[[Machine], list[Finding]]
