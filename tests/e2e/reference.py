"""What transformers says: the reference for greedy text and log-probabilities, in float32.

A greedy text is checked without generating it twice: if at every position the reference's most likely
next token, given the tokens before it, is the one that was served, then by induction it would have
produced the same text. One forward pass a text instead of one a token.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(directory: Path, prompt: list[int], output: list[int]) -> torch.Tensor:
    """``[len(output), vocab]`` natural log-probabilities of the positions that predicted ``output``."""
    ids = torch.tensor([prompt + output[:-1]])
    with torch.inference_mode():
        logits = load(directory)(ids, logits_to_keep=len(output)).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def first_difference(directory: Path, prompt: list[int], output: list[int]) -> tuple[int, float] | None:
    """Where greedy decoding by the reference leaves ``output``, and by how much log-probability; None = nowhere."""
    return _first_difference(directory, tuple(prompt), tuple(output))


@cache
def _first_difference(directory: Path, prompt: tuple[int, ...], output: tuple[int, ...]) -> tuple[int, float] | None:
    """The same tokens are computed once, whichever tests ask."""
    rows = logprobs(directory, list(prompt), list(output))
    best = rows.max(-1)
    for i, token in enumerate(output):
        if int(best.indices[i]) != token:
            return i, float(best.values[i] - rows[i, token])
    return None
