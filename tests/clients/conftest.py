"""The endpoint that clients are tried against: what `make test-clients` started."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def base() -> str:
    return os.environ["PD_SERVE_URL"]


@pytest.fixture(scope="session")
def url(base: str) -> str:
    return base + "/v1"


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["PD_SERVE_MODEL_NAME"]


@pytest.fixture(scope="session")
def tokenizer() -> str:
    """A directory, for programs that count tokens themselves."""
    return os.environ["PD_SERVE_TOKENIZER"]
