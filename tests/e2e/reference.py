"""What transformers says: the reference for greedy text and log-probabilities, in float32.

A greedy text is checked without generating it twice: if at every position the reference's most likely
next token, given the tokens before it, is the one that was served, then by induction it would have
produced the same text. One forward pass a text instead of one a token.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pd_serve.paths import cache_directory


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
    """Where greedy decoding by the reference leaves ``output``, and by how much log-probability; None = nowhere.

    That it does not is kept in the cache, under all that it follows from: the model's bytes, the libraries, this file,
    the tokens.
    """
    versions = [version("torch"), version("transformers")]
    told = json.dumps([_digest(directory), versions, Path(__file__).read_text(), prompt, output])
    kept = cache_directory() / "reference" / hashlib.sha256(told.encode()).hexdigest()
    if kept.exists():
        return None
    found = _first_difference(directory, prompt, output)
    if found is None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
    return found


@cache
def _digest(directory: Path) -> str:
    """Of weights and configuration."""
    found = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _first_difference(directory: Path, prompt: list[int], output: list[int]) -> tuple[int, float] | None:
    rows = logprobs(directory, prompt, output)
    best = rows.max(-1)
    for i, token in enumerate(output):
        if int(best.indices[i]) != token:
            return i, float(best.values[i] - rows[i, token])
    return None
