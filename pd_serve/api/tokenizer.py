"""A model's tokenizer as the API needs it: text to ids, ids to text, and the exact bytes of one token.

Owns a ``tokenizers.Tokenizer`` built from the bundle's tokenizer.json. Created once for each model by the
router; ``encode`` and ``decode`` may be called from any thread. Never trims, pads or adds chat markup.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from pd_serve.errors import ModelError


class TextTokenizer:
    """``exact`` says that a token is a fixed run of bytes (byte-level BPE, SentencePiece with byte
    fall-back), so that text can be decoded token by token without context."""

    def __init__(
        self, tokenizer_json: bytes, *, bos_token: str | None = None, add_bos_token: bool | None = None
    ) -> None:
        try:
            self._fast: Any = FastTokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"the model's tokenizer.json cannot be loaded: {error}") from error
        self._fast.no_padding()
        self._fast.no_truncation()
        added = self._fast.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        self._kind = _decoder_kind(self._fast)
        self.exact = self._kind is not None
        self._bytes: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}  # of tokens that are whole characters; filled by :meth:`token_bytes`
        self.size: int = self._fast.get_vocab_size(with_added_tokens=True)
        bos = self._fast.token_to_id(bos_token) if bos_token is not None else None
        probe = self._fast.encode("a").ids
        # transformers adds BOS where tokenizer_config says so, even if the post-processor was lost on the way.
        self._prepend: list[int] = [bos] if add_bos_token and bos is not None and probe[:1] != [bos] else []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # A batch, because only that can be had without offsets, a tenth of the time.
        ids: list[int] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return self._prepend + ids if add_special_tokens and self._prepend else ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """All at once, as the library does it."""
        text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it; empty for ids that have none."""
        return self._fast.id_to_token(id) or ""

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text. For tokenizers that are not ``exact``: its text decoded alone."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._make_bytes(id)
            with contextlib.suppress(UnicodeDecodeError):
                self.texts[id] = found.decode()
        return found

    def token_text(self, id: int) -> str:
        """For logprobs: the token's text, with U+FFFD where it is a part of a character only."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def _make_bytes(self, id: int) -> bytes:
        if self._kind is None:
            return self.decode([id], skip_special_tokens=False).encode("utf-8")
        token = self.token(id)
        if self._kind == "byte_level":
            mapped = [_BYTE_OF.get(character) for character in token]
            if None in mapped:
                return token.encode("utf-8")
            return bytes(byte for byte in mapped if byte is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace("▁", " ").encode("utf-8")


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: the printable ones are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + place): byte for place, byte in enumerate(rest)})
    return table


_BYTE_OF = _byte_of()


def _decoder_kind(fast: Any) -> str | None:
    """ "byte_level", "sentencepiece", or None where decoding needs the whole sequence."""
    # The decoder pickles as its JSON form; serialising the whole tokenizer would cost seconds for large ones.
    state = fast.decoder.__getstate__() if fast.decoder is not None else b"null"
    spec = json.loads(state)
    if not isinstance(spec, dict):
        return None
    parts = spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return "byte_level"
    pieces = {"Replace", "ByteFallback", "Fuse", "Strip"}
    if "Replace" not in kinds or not set(kinds) <= pieces:
        return None
    for part in parts:
        if part["type"] == "Replace" and (part.get("pattern") != {"String": "▁"} or part.get("content") != " "):
            return None
        # Strip takes the space off the very first word; output always continues a prompt, so it keeps its own.
        if part["type"] == "Strip" and (part.get("content") != " " or part.get("stop") != 0):
            return None
    return "sentencepiece"
