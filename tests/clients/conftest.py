"""The endpoint that clients are tried against: what `make test-clients` started."""

from __future__ import annotations

import os
from enum import StrEnum

import pytest
from pydantic import BaseModel, Field


class Name(StrEnum):
    PARIS = "Paris"
    ROME = "Rome"


class City(BaseModel):
    """A city and its size."""

    name: Name
    millions: int = Field(ge=1, le=9, description="inhabitants")


QUESTION = "Which city is the capital of France?"


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["PD_SERVE_URL"] + "/v1"


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["PD_SERVE_MODEL_NAME"]
