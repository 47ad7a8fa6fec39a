"""The settings of PyTorch's CUDA allocator as text: read from the environment, and changed in one key.

``PYTORCH_CUDA_ALLOC_CONF`` and ``PYTORCH_ALLOC_CONF`` hold ``key:value`` pairs between commas; values may be lists in
brackets. PyTorch drops all white space, takes one of the two variables only, and resets some options that a text it is
handed does not name, so that a text is always handed over whole. Used by :mod:`pd_serve.memory.torch_pool`, by the
checks at start and by doctor. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# torch 2.13 reads the first that is set, even if empty; torch 2.9 looked in the other order.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE_SEGMENTS = "expandable_segments"

_TOKENS = re.compile(r"[,:\[\]]|[^,:\[\]]+")
_ON = ("true", "1")


def from_environment(environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """A variable and its text: one that asks for expandable segments, else the first that is set, else two empty texts.

    Releases of PyTorch differ in which of the two wins where both are set, so that either counts.
    """
    environ = os.environ if environ is None else environ
    given = [(variable, environ[variable]) for variable in VARIABLES if variable in environ]
    return next((one for one in given if has_expandable_segments(one[1])), given[0] if given else ("", ""))


def parse(text: str) -> list[tuple[str, str]]:
    """Keys and values in their order, without white space; a list keeps its brackets. What is no pair is left out."""
    tokens = _TOKENS.findall("".join(text.split()))
    pairs = []
    at = 0
    while at < len(tokens):
        if at + 2 < len(tokens) and tokens[at] not in ",:[]" and tokens[at + 1] == ":":
            end = at + 3
            if tokens[at + 2] == "[":
                while end < len(tokens) and tokens[end - 1] != "]":
                    end += 1
            pairs.append((tokens[at], "".join(tokens[at + 2 : end])))
            at = end
        else:
            at += 1
    return pairs


def has_expandable_segments(text: str) -> bool:
    """Whether a text asks for expandable segments; of several values the last one counts.

    PyTorch itself takes ``True`` and ``False`` and fails on other words later, at the first allocation. Here ``true``,
    ``1`` and other cases of the key mean what their writer meant, so that the answer comes before that.
    """
    values = [value for key, value in parse(text) if key.lower() == EXPANDABLE_SEGMENTS]
    return bool(values) and values[-1].lower() in _ON


def with_expandable_segments(text: str, on: bool) -> str:
    """The same text with this one option replaced, or added."""
    pairs = [(key, value) for key, value in parse(text) if key.lower() != EXPANDABLE_SEGMENTS]
    return ",".join(f"{key}:{value}" for key, value in [*pairs, (EXPANDABLE_SEGMENTS, str(on))])
