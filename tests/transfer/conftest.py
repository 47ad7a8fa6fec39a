"""A directory for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As ``tmp_path``, which is longer for a worker of several: a path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pd-") as name:
        yield Path(name)
