"""Writes ``tokenizer.json`` and ``tokenizer_config.json`` from the vocabulary in a GGUF file.

Called by the conversion only. A GGUF file names its pre-tokenizer instead of spelling it out, so each name needs
its rules here; a name without rules is an error, because a wrong split is a wrong prompt that nobody notices.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pd_serve.errors import ModelError
from pd_serve.models.end_tokens import tokenizer_end_ids

log = logging.getLogger(__name__)

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece's visible space
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# names of pre-tokenizers whose split is one expression: the expression, and whether whole words skip the merges
_SPLITS = {
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True),
    "llama3": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False),
    "deepseek-r1-qwen": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ),
}
_GPT2_LIKE = ("gpt-2", "smollm")
_NFC = ("qwen2", "deepseek-r1-qwen")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "tekken")


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, max_positions: int) -> dict[str, Any]:
    """Writes both files; returns the token ids (``bos_token_id``, ``eos_token_id``, ...) for the model's config."""
    get = _Fields(metadata)
    tokens: list[str] = get("tokens")
    kind = get("model")
    if kind == "gpt2":
        tokenizer, bos_default = _byte_level(get, tokens), get("pre", "gpt-2") in _BOS_BY_DEFAULT
    elif kind == "llama":
        tokenizer, bos_default = _sentencepiece(get, tokens), True
    else:
        raise ModelError(f"The GGUF file's tokenizer is of kind {kind!r}; supported are gpt2 and llama.")
    types = get("token_type", [_NORMAL] * len(tokens))
    added = [
        AddedToken(token, special=type_ == _CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    ids = {name: _id(get, f"{name}_token_id", tokens) for name in ("bos", "eos", "padding", "unknown")}
    _add_borders(tokenizer, tokens, get("add_bos_token", bos_default), get("add_eos_token", False), ids)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)

    templates = _chat_templates(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        if (token_id := ids[name]) is not None:
            config[key] = tokens[token_id]
    if templates:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        config["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")

    eos = [_id(get, name, tokens) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    # read back as from any model's files: what ends a turn, where a chat template writes it
    eos += tokenizer_end_ids(directory)
    eos = list(dict.fromkeys(i for i in eos if i is not None))
    found = {
        "bos_token_id": ids["bos"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": ids["padding"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By name; further ones than the default are ``tokenizer.chat_template.<name>``."""
    key = "tokenizer.chat_template"
    found = {"default": metadata.get(key)}
    found |= {name.removeprefix(f"{key}."): value for name, value in metadata.items() if name.startswith(f"{key}.")}
    return {name: template for name, template in found.items() if isinstance(template, str) and template}


class _Fields:
    """The tokenizer's fields of the metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def __call__(self, name: str, *default: Any) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key in self._metadata:
            return self._metadata[key]
        if default:
            return default[0]
        raise ModelError(f"The GGUF file has no {key}; it holds no tokenizer that can be converted.")


def _id(get: _Fields, name: str, tokens: list[str]) -> int | None:
    """A token id, if the file names one that exists (some files write the largest integer for none)."""
    value = get(name, None)
    return value if value is not None and 0 <= value < len(tokens) else None


def _byte_level(get: _Fields, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE with the merges of the file."""
    pre = get("pre", "")
    if not pre:
        pre = "gpt-2"
        log.warning(
            "the GGUF file names no pre-tokenizer; GPT-2's is used, and prompts may be split otherwise than the model "
            "was trained with. Convert the model anew with today's llama.cpp, or use its HuggingFace directory."
        )
    split, ignore_merges = _SPLITS.get(pre, (None, False))
    if split is None and pre not in _GPT2_LIKE:
        supported = ", ".join([*_GPT2_LIKE, *_SPLITS])
        raise ModelError(
            f"The GGUF file's pre-tokenizer {pre!r} is not known; known are {supported}. "
            "Use the model's HuggingFace directory (safetensors and tokenizer.json) instead."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    elif pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: _Fields, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: the best-scored piece is merged first; what no piece covers becomes byte tokens."""
    unknown = _id(get, "unknown_token_id", tokens) or 0
    merges = _merges_from_scores(tokens, get("scores"), get("token_type"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = get("add_space_prefix", True)
    visible: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *visible] if prefix else visible)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best score first; user-defined pieces never take part."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], i, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_borders(
    tokenizer: Tokenizer, tokens: list[str], add_bos: bool, add_eos: bool, ids: Mapping[str, int | None]
) -> None:
    """The post-processor that puts BOS before and EOS after a text, where the model wants them."""
    bos = ids["bos"] if add_bos else None
    eos = ids["eos"] if add_eos else None
    if bos is None and eos is None:
        return
    before = [tokens[bos]] if bos is not None else []
    after = [tokens[eos]] if eos is not None else []
    special = [(tokens[i], i) for i in (bos, eos) if i is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=list(dict.fromkeys(special)),
    )
