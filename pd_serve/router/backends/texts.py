"""The text side of a model that another engine serves, from a directory of this machine: tokenizer, template, limits.

Nodes of pd-serve send theirs over the link; other engines do not, so that the router is told where the files are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pd_serve.errors import ConfigError, ModelError
from pd_serve.wire.link import ModelInfo
from pd_serve.wire.model import ModelBundle, bundle_from_directory, encode_bundle, text_hash
from pd_serve.wire.model_files import read_json


class Text(NamedTuple):
    bundle: ModelBundle
    info: ModelInfo


def directory(tokenizers: Sequence[str], name: str, root: str) -> Path:
    """Where the files of the model ``name`` are. ``tokenizers``: DIRECTORY or NAME=DIRECTORY, as set; ``root``: where
    the server has them, which may be here, too. Raises ModelError."""
    named = [entry.partition("=") for entry in tokenizers if "=" in entry]
    for given in [place for model, _, place in named if model == name] + [e for e in tokenizers if "=" not in e]:
        if not (Path(given) / "tokenizer.json").is_file():
            raise ConfigError(f"--tokenizer {given}: there is no tokenizer.json: give the model's directory")
        return Path(given)
    if root and (Path(root) / "tokenizer.json").is_file():
        return Path(root)
    raise ModelError(
        f"the tokenizer of '{name}' is not here ({root or 'the server does not say where it has it'}): give the "
        "directory of the model's tokenizer.json and config.json with --tokenizer"
    )


def read(path: Path, name: str, fingerprint: str, max_model_len: int) -> Text:
    """``max_model_len``: 0 where the server does not say it. Raises ModelError."""
    bundle = bundle_from_directory(path, name=name, fingerprint=fingerprint)
    config = read_json(path / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    generation = read_json(path / "generation_config.json")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    limit = max_model_len or int(config.get("max_position_embeddings") or 0)
    if not limit:
        raise ModelError(f"neither the server nor {path}/config.json says how long a sequence of '{name}' may be")
    info = ModelInfo(
        name=name,
        fingerprint=fingerprint,
        max_model_len=limit,
        vocab_size=int(config.get("vocab_size") or _vocab_size(bundle.tokenizer_json)),
        eos_token_ids=[int(id) for id in (ends if isinstance(ends, list) else [ends] if ends is not None else [])],
        text=text_hash(encode_bundle(bundle)),
    )
    return Text(bundle, info)


def fingerprint(kind: str, name: str) -> str:
    """Other engines do not say what their weights are: servers of one kind and name are taken to have the same."""
    return hashlib.sha256(f"{kind} {name}".encode()).hexdigest()[:16]


def _vocab_size(tokenizer_json: bytes) -> int:
    document = json.loads(tokenizer_json)
    vocab = document["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max([0, *map(int, ids), *(int(token["id"]) for token in document.get("added_tokens") or ())])
