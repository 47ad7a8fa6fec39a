"""Programs of a client's package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(program: str, *arguments: str) -> str:
    """What it says. It has to end well."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said
