"""What every client is to ask: a question, and the form of its answer.

Clients are used as their users write them, untouched, with a model of 135 million parameters behind. Run by
`make test-clients`, each in an environment of its own: these packages are no part of pd-serve's.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

KEY = "none"
QUESTION = "Which city is the capital of France?"
SAID: list[Any] = [{"role": "user", "content": QUESTION}]


class Name(StrEnum):
    PARIS = "Paris"
    ROME = "Rome"


class City(BaseModel):
    """A city and its size."""

    name: Name
    millions: int = Field(ge=1, le=9, description="inhabitants")


def look(name: str) -> str:
    """Looks a city up."""
    return f"{name} is a city."
