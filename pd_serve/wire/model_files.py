"""Reads the text side of a HuggingFace directory: chat templates, special tokens, sampling defaults.

Called where a :class:`~pd_serve.wire.model.ModelBundle` is made, and by the engine for the tokens that end a text.
Files come from anywhere: what they cannot mean is a ``ModelError``, or a warning where the model can be served
without it.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from pd_serve.errors import ModelError

log = logging.getLogger(__name__)

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# what generation_config.json may set: the least and the largest value that a request may give too
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (-1.0, 2.0**31),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file. Raises ``ModelError``."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def special_tokens(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """As chat templates name them; tokenizer_config.json (``config``) wins over special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (read_json(root / "special_tokens_map.json"), config):
        for key in _SPECIAL_NAMES:
            value = source.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def chat_templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. As in transformers a .jinja file wins over chat_template.json, and that over tokenizer_config.json."""
    found = _named(config.get("chat_template"), root / "tokenizer_config.json")
    legacy = root / "chat_template.json"
    found |= _named(read_json(legacy).get("chat_template"), legacy)
    if (root / "chat_template.jinja").is_file():
        found["default"] = read_text(root / "chat_template.jinja")
    for extra in sorted((root / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = read_text(extra)
    return found


def sampling_defaults(root: Path) -> dict[str, float]:
    """What generation_config.json sets for requests that do not say. ``do_sample: false`` is temperature 0.

    A value that cannot be meant is left out, with a warning.
    """
    path = root / "generation_config.json"
    generation = read_json(path)
    found: dict[str, float] = {}
    for key, (low, high) in _RANGES.items():
        value = generation.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            log.warning("%s: %s %.80r is ignored; it must be a number from %g to %g", path, key, value, low, high)
        elif key == "top_k" and value != math.floor(value):
            log.warning("%s: top_k %r is ignored; it must be a whole number", path, value)
        else:
            found[key] = float(value)
    do_sample = generation.get("do_sample")
    if do_sample is False:
        found["temperature"] = 0.0
    elif do_sample is not None and do_sample is not True:
        log.warning("%s: do_sample %.80r is ignored; it must be true or false", path, do_sample)
    return found


def _named(value: Any, path: Path) -> dict[str, str]:
    """A template, or a list or an object of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and all(isinstance(template, str) for template in value.values()):
        return dict(value)
    if isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("template"), str)
        and isinstance(entry.get("name", "default"), str)
        for entry in value
    ):
        return {entry.get("name", "default"): entry["template"] for entry in value}
    raise ModelError(f"{path}: chat_template must be a text or a list of named templates: give --chat-template FILE")


def read_text(path: Path) -> str:
    """A chat template's file. Raises ``ModelError``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from None
