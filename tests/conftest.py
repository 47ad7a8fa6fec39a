"""What all tests share: the real models, converted once into the cache that users have too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pd_serve.models.source import resolve
from tests.certificates import make_certificate

REAL_MODELS = {"smollm2", "gemma3"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a real model is slow: it may have to be downloaded and converted first."""
    for item in items:
        if REAL_MODELS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, in HuggingFace form."""
    return Path(resolve("smollm2-135m", "float32", "auto").directory)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M (a base model with sliding windows) in float32, in HuggingFace form."""
    return Path(resolve("gemma3-270m", "float32", "auto").directory)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1, signed by itself, and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))
