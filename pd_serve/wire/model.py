"""What a router needs to know of a model to tokenise, to apply its chat template and to detokenise.

A node sends its ``ModelBundle`` over the link to a router that asks for it; a router asks once for each model
fingerprint and text. Built from the files of a HuggingFace directory without torch or transformers, so that a
router needs no model directory of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from pd_serve.errors import ModelError


class ModelBundle(msgspec.Struct, frozen=True):
    """The text side of a model. ``generation_defaults`` is information only: requests that name no
    temperature and so on get OpenAI's defaults, never the model's."""

    name: str
    fingerprint: str
    tokenizer_json: bytes
    chat_templates: dict[str, str] = {}  # "default" and, where the model has one, "tool_use"
    special_tokens: dict[str, str] = {}  # bos_token, eos_token ... as chat templates name them
    add_bos_token: bool | None = None  # tokenizer_config's; None: the tokenizer's post-processor decides alone
    generation_defaults: dict[str, float] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ModelBundle)

encode_bundle = _encoder.encode
decode_bundle = _decoder.decode


def text_hash(bundle: bytes) -> str:
    """Of an encoded bundle, for ``ModelInfo.text``."""
    return hashlib.sha256(bundle).hexdigest()[:32]


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_GENERATION_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def bundle_from_directory(path: str | Path, *, name: str = "", fingerprint: str = "") -> ModelBundle:
    """Reads a model directory in HuggingFace form.

    Raises ModelError when ``tokenizer.json`` is missing or one of the JSON files cannot be read.
    """
    root = Path(path)
    tokenizer = root / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{root} has no tokenizer.json: only models with a fast (tokenizers) tokenizer can be served")
    config = _read_json(root / "tokenizer_config.json")
    special: dict[str, str] = {}
    for source in (_read_json(root / "special_tokens_map.json"), config):
        for key in _SPECIAL_NAMES:
            value = source.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                special[key] = value
    generation = _read_json(root / "generation_config.json")
    add_bos = config.get("add_bos_token")
    return ModelBundle(
        name=name or root.name,
        fingerprint=fingerprint,
        tokenizer_json=tokenizer.read_bytes(),
        chat_templates=_chat_templates(root, config),
        special_tokens=special,
        add_bos_token=add_bos if isinstance(add_bos, bool) else None,
        generation_defaults={
            key: float(generation[key])
            for key in _GENERATION_NAMES
            if isinstance(generation.get(key), int | float) and not isinstance(generation.get(key), bool)
        },
    )


def _chat_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files win over tokenizer_config's entry, which is a string or a list of named templates."""
    found: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                found[str(entry.get("name", "default"))] = entry["template"]
    if (root / "chat_template.jinja").is_file():
        found["default"] = (root / "chat_template.jinja").read_text(encoding="utf-8")
    for extra in sorted((root / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = extra.read_text(encoding="utf-8")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value
