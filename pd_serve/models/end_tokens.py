"""The tokens that end a text or a turn, as the tokenizer's files name them.

Called by :mod:`pd_serve.models.config`, which adds those of ``config.json`` and ``generation_config.json``. Counted are
the EOS token that the tokenizer names, and the ends of turns that are known as such, that the tokenizer marks as
special and that a chat template writes: many models name only the end of a document as EOS, and talk on without end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pd_serve.models.fields import token_ids
from pd_serve.wire.model_files import chat_templates, read_json, special_tokens

ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|eot|>")


def tokenizer_end_ids(directory: Path, chat_template: str | None = None) -> tuple[int, ...]:
    """Token ids, without repetition; ``chat_template``: in place of the model's own. Raises ``ModelError``."""
    config = read_json(directory / "tokenizer_config.json")
    templates = [chat_template] if chat_template is not None else chat_templates(directory, config).values()
    written = "".join(templates)
    turns = [token for token in ENDS_OF_TURN if token in written]
    eos = special_tokens(directory, config).get("eos_token")
    if eos is None and not turns:
        return ()
    specials = _listed(config)
    found = [specials.get(token) for token in ([eos] if eos else []) + turns]
    if not specials or (eos and found[0] is None):  # the large file is read only if the small one does not say it all
        tokenizer = read_json(directory / "tokenizer.json")
        specials = {**_added(tokenizer.get("added_tokens")), **specials}
        found = [specials.get(token) for token in turns]
        if eos:
            found.insert(0, specials[eos] if eos in specials else _in_vocabulary(tokenizer, eos))
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _listed(config: dict[str, Any]) -> dict[str, int]:
    """The special tokens of ``tokenizer_config.json``."""
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return {}
    return _added(
        [{**entry, "id": int(i)} for i, entry in entries.items() if isinstance(entry, dict) and i.isdecimal()]
    )


def _added(entries: Any) -> dict[str, int]:
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("special") is True and isinstance(entry.get("content"), str):
            for i in token_ids(entry, "id", "tokenizer.json"):
                found[entry["content"]] = i
    return found


def _in_vocabulary(tokenizer: dict[str, Any], token: str) -> int | None:
    """Where EOS is a plain entry of the vocabulary, or an added token that is not marked."""
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and entry.get("content") == token and isinstance(entry.get("id"), int):
            return int(entry["id"])
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        value = vocabulary.get(token)
        return value if isinstance(value, int) and value >= 0 else None
    if isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
        return next((i for i, item in enumerate(vocabulary) if isinstance(item, list) and item[:1] == [token]), None)
    return None
