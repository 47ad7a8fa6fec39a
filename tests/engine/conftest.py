"""A scripted engine for tests of its core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(f"ipc://{tmp_path}/engine")
    yield node
    node.close()
