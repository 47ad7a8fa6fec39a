"""What is made once for several files of tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import gguf
import pytest


@pytest.fixture(scope="session")
def gguf_read_once() -> Iterator[None]:
    """transformers reads a GGUF file's vocabulary, ten seconds of Python, for each thing that it wants of the file, and
    makes the map of all names for each module of a model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield
