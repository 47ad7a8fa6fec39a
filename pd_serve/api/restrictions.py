"""Fields that take tokens away from the model: ``allowed_token_ids`` and ``bad_words``; and a request's ``cache_salt``.

What a request may say of them is checked here, for the schemas and, where it needs the model, for its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import pydantic_core

from pd_serve.api.errors import bad_request
from pd_serve.api.tokenizer import TextTokenizer

MAX_BAD_WORDS = 256
MAX_WORD_CHARACTERS = 256
MAX_SALT_CHARACTERS = 1024


def bad_words(value: list[str] | None) -> list[str] | None:
    for word in value or ():
        if not word.strip():
            raise pydantic_core.PydanticCustomError("bad_words", "a bad word must have a character that is no space")
        if len(word) > MAX_WORD_CHARACTERS:
            raise pydantic_core.PydanticCustomError(
                "bad_words", "a bad word may have at most {limit} characters", {"limit": MAX_WORD_CHARACTERS}
            )
    if value is not None and len(value) > MAX_BAD_WORDS:
        raise pydantic_core.PydanticCustomError(
            "bad_words", "at most {limit} bad words are allowed", {"limit": MAX_BAD_WORDS}
        )
    return value


def word_tokens(words: Sequence[str], tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokenizer writes it at the beginning of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def check_something_is_left(
    allowed: Sequence[int], words: Sequence[tuple[int, ...]], ends: Sequence[int], min_tokens: int
) -> None:
    """``ends``: what ends the output, and may not come before ``min_tokens``."""
    left = set(allowed).difference(word[0] for word in words if len(word) == 1)
    if allowed and not left:
        raise bad_request("'bad_words' forbid all of 'allowed_token_ids': allow another token", "bad_words")
    if allowed and min_tokens and left.issubset(ends):
        raise bad_request(
            "'allowed_token_ids' are nothing but ends, which 'min_tokens' forbids: allow another token", "min_tokens"
        )


def salt_of(cache_salt: str | None) -> bytes:
    """What nodes are told of it: a digest, as the client's own words are nobody's business."""
    return b"" if cache_salt is None else blake2b(cache_salt.encode(), digest_size=32).digest()
