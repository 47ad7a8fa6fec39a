"""The systems that several files of tests use; what breaks one starts its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import tiny_model
from tests.e2e.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "small", tiny_model.SMALL)


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Cluster]:
    """A pair that serves SmolLM2. Files whose tests ask for it are one group of xdist's: the first of FIRST
    in tests/conftest.py."""
    directory = tmp_path_factory.mktemp("smol")
    flags: dict[str, object] = {"max_model_len": 1024, "kv_cache_memory": "384MiB", "max_queue_wait_s": 300}
    with cluster(directory, model=smollm2, **flags) as running:
        yield running
