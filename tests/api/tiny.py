"""Tiny tokenizers and a model around them, made in a moment: one of each kind that the API tells apart."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pd_serve.wire.link import ModelInfo
from pd_serve.wire.model import ModelBundle

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def main():\n    return 42\n\n\tprint('hello, world')",
    "Zażółć gęślą jaźń — naïve café, 東京は日本の首都です。",
    "User: STOP </s> END ### stop words and stop strings",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
SPECIALS = ["<|end|>", "<|start|>"]
EOS = 0
EMOJI = "🦊👩‍👩‍👧‍👦é😀"  # several tokens for each character: none of them is in the training text


@cache
def byte_level() -> bytes:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer.to_str().encode()


@cache
def sentencepiece(strip: bool = False) -> bytes:
    """As Gemma's (or with ``strip`` Llama 2's): spaces as ▁, unknown characters as bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: id for id, token in enumerate([*SPECIALS, "<unk>", *byte_tokens])}
    merges = []
    for word in ("▁the", "▁fox", "stop", "▁▁"):
        for character in word:
            vocab.setdefault(character, len(vocab))
        for size in range(2, len(word) + 1):
            if word[:size] not in vocab:
                vocab[word[:size]] = len(vocab)
                merges.append((word[: size - 1], word[size - 1]))
    for character in "abcdefghijklmnopqrstuvwxyzABC.,:é東":
        vocab.setdefault(character, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer.to_str().encode()


@cache
def wordpiece() -> bytes:
    """Decodes with context: a space goes before each word but the first."""
    words = ["[UNK]", *SPECIALS, "stop", "the", "fox", "run", "##ning", "##s", ",", "."]
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer.to_str().encode()


def vocab_size(tokenizer_json: bytes) -> int:
    document = json.loads(tokenizer_json)
    return 1 + max([*document["model"]["vocab"].values(), *(token["id"] for token in document["added_tokens"])])


def bundle(name: str = "tiny", *, fingerprint: str = "f1", chat: bool = True) -> ModelBundle:
    return ModelBundle(
        name=name,
        fingerprint=fingerprint,
        tokenizer_json=byte_level(),
        chat_templates={"default": CHAT_TEMPLATE} if chat else {},
        special_tokens={"eos_token": SPECIALS[EOS]},
    )


def info(name: str = "tiny", *, fingerprint: str = "f1", max_model_len: int = 512) -> ModelInfo:
    return ModelInfo(name, fingerprint, max_model_len, vocab_size(byte_level()), [EOS])
