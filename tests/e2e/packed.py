"""Real models cut to a few megabytes, for GPU machines that no network reaches.

    python -m tests.e2e.packed pack FILE      # where the real ones are: first layers, first tokens, 4 bits a weight
    python -m tests.e2e.packed unpack FILE DIRECTORY

Unpacked, each is a model in HuggingFace form whose float32 weights are what the 4 bits stand for, with prompts of token
ids made of real text. What such a model says is no text, but its numbers are those of a model that was trained: norms
far from one, outliers in activations, sharp and flat attention. Tests compare on it what transformers computes on it.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.api import tiny
from tests.e2e.prompts import raw_prompts

LAYERS, VOCAB = 6, 4096  # Gemma 3 has a layer without a window in every six
GROUP = 64  # weights that share a scale
MODELS = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}


def pack(path: Path) -> None:
    from pd_serve.models.source import resolve

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, alias in MODELS.items():
        directory = resolve(alias, "float32").directory
        with safe_open(directory / "model.safetensors", "pt") as file:
            kept = [key for key in file.keys() if _layer(key) < LAYERS]  # noqa: SIM118
            for key in kept:
                weight = file.get_tensor(key).float().numpy()
                weight = weight[:VOCAB] if "embed_tokens" in key or "lm_head" in key else weight
                arrays |= {f"{name}/{key}/{part}": value for part, value in _quantised(weight).items()}
        config = json.loads((directory / "config.json").read_text())
        config |= {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": tiny.EOS}
        config |= {"pad_token_id": 0, "layer_types": (config.get("layer_types") or [])[:LAYERS] or None}
        arrays[f"{name}.json"] = np.array([json.dumps(config), json.dumps(_prompts(directory))])
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # its stub takes a flag of that name for all


def unpack(path: Path, directory: Path) -> None:
    with np.load(path) as file:
        for name in MODELS:
            out = directory / name
            out.mkdir(parents=True, exist_ok=True)
            config, prompts = map(str, file[f"{name}.json"])
            (out / "config.json").write_text(config)
            (out / "prompts.json").write_text(prompts)
            (out / "tokenizer.json").write_bytes(tiny.byte_level())
            (out / "tokenizer_config.json").write_text("{}")
            parts: dict[str, dict[str, Any]] = {}
            for key in file.files:
                if key.startswith(f"{name}/"):
                    tensor, part = key.removeprefix(f"{name}/").rsplit("/", 1)
                    parts.setdefault(tensor, {})[part] = file[key]
            weights = {tensor: torch.from_numpy(_restored(**kept)) for tensor, kept in parts.items()}
            save_file(weights, out / "model.safetensors", {"format": "pt"})


def prompts_of(directory: Path) -> list[list[int]]:
    """Token ids: of a packed model its own, else what its tokenizer makes of real text."""
    own = directory / "prompts.json"
    if own.exists():
        found: list[list[int]] = json.loads(own.read_text())
        return found
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(prompt)["input_ids"] for prompt in raw_prompts()]


def _prompts(directory: Path) -> list[list[int]]:
    """Of real text, without the tokens that are cut off; and one longer than Gemma's window, of all of it."""
    found = [[token for token in prompt if token < VOCAB] for prompt in prompts_of(directory)]
    return [*(prompt for prompt in found if len(prompt) > 2), list(itertools.chain(*found))[:900]]


def _layer(key: str) -> int:
    """-1 for what is in no layer."""
    parts = key.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _quantised(weight: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Norms and biases as they are."""
    if weight.ndim == 1:
        return {"whole": weight}
    groups = weight.reshape(-1, GROUP)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    low, scale = low.astype(np.float16), ((high - low) / 15).astype(np.float16)
    steps = np.clip(np.rint((groups - low) / np.maximum(scale, np.float16(1e-7)).astype(np.float32)), 0, 15)
    pairs = steps.astype(np.uint8).reshape(-1, 2)
    return {"low": low, "scale": scale, "steps": pairs[:, 0] << 4 | pairs[:, 1], "shape": np.array(weight.shape)}


def _restored(**kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if "whole" in kept:
        return kept["whole"]
    steps = np.stack((kept["steps"] >> 4, kept["steps"] & 15), -1).reshape(-1, GROUP).astype(np.float32)
    return (steps * kept["scale"].astype(np.float32) + kept["low"].astype(np.float32)).reshape(tuple(kept["shape"]))


if __name__ == "__main__":
    if sys.argv[1] == "pack":
        pack(Path(sys.argv[2]))
    else:
        unpack(Path(sys.argv[2]), Path(sys.argv[3]))
