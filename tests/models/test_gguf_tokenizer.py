"""Tokenizers that come out of GGUF files: splits, borders, bytes, and the way back to text."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from pd_serve.models.gguf import convert
from pd_serve.wire.model import bundle_from_directory
from tests.models import reference
from tests.models.gguf_files import write_gguf

TEXTS = [
    "Hello, world! It's 2026-10-20, 3.14159 and 1234567.",
    "def f(x):\n    return x ** 2\n\n\t# done",
    "naïve café — 你好，世界 🙂",
    "  leading and trailing  ",
    "a\n\n\nb\r\nc",
    "x  12   y\n 7",
    "\u0000 control \u200d joiners é e\u0301",
    "",
]


@cache
def tokenizer_of(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def tiny(tmp_path: Path, family: str, arch: str, pre: str = "smollm", **extra: object) -> Tokenizer:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference.make_tiny(family, tmp_path / "hf"), arch, pre=pre, **extra)
    (tmp_path / "out").mkdir()
    convert(path, tmp_path / "out", "float32", lambda done, total: None)
    return tokenizer_of(tmp_path / "out")


def test_a_file_without_a_pre_tokenizer_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny(tmp_path, "llama", "llama", pre="")
    assert "names no pre-tokenizer" in caplog.text


def test_templates_and_sampling_of_the_metadata(tmp_path: Path) -> None:
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    tiny(tmp_path, "llama", "llama", **named, **{"general.sampling.top_k": 5})
    bundle = bundle_from_directory(tmp_path / "out")
    assert bundle.chat_templates == {"default": "a", "tool_use": "b"}
    assert bundle.generation_defaults == {"top_k": 5.0}


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(model: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_of(request.getfixturevalue(model))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_smollm2_splits_every_digit_and_adds_no_bos(smollm2: Path) -> None:
    tokenizer = tokenizer_of(smollm2)
    assert tokenizer.encode("in 1969").tokens == ["in", "Ġ", "1", "9", "6", "9"]
    assert tokenizer.encode("a  5").tokens == ["a", "ĠĠ", "5"]  # GPT-2 would say Ġ and Ġ5
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[0] == 1
    assert tokenizer.decode([1, 28120, 2], skip_special_tokens=True) == tokenizer.decode([28120])


@pytest.mark.usefixtures("gguf_read_once")
def test_smollm2_agrees_with_transformers_once_digits_are_split(smollm2: Path) -> None:
    """transformers' own conversion forgets the digits; given them, it says the same of every text."""
    from transformers import AutoTokenizer

    from pd_serve.paths import cache_directory

    theirs = AutoTokenizer.from_pretrained(cache_directory() / "downloads", gguf_file="smollm2-135m.gguf")
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = tokenizer_of(smollm2)
    source = Path(reference.__file__).read_text()
    for text in [*TEXTS, source, *source.split()]:
        assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], text


def test_gemma3_begins_with_bos_and_keeps_runs_of_spaces_whole(gemma3: Path) -> None:
    tokenizer = tokenizer_of(gemma3)
    assert tokenizer.encode("hi").tokens[0] == "<bos>"
    assert tokenizer.encode("hi", add_special_tokens=False).ids == tokenizer.encode("hi").ids[1:]
    assert tokenizer.encode("a    b", add_special_tokens=False).tokens == ["a", "    ", "b"]
    assert tokenizer.encode("a\n\n\nb", add_special_tokens=False).tokens == ["a", "\n\n\n", "b"]
    # no piece covers it: four byte tokens, not <unk>
    assert len(tokenizer.encode("\U00010380", add_special_tokens=False).ids) == 4


def test_transformers_reads_the_directory_alike(smollm2: Path, gemma3: Path) -> None:
    from transformers import AutoTokenizer

    for directory in (smollm2, gemma3):
        theirs, ours = AutoTokenizer.from_pretrained(directory), tokenizer_of(directory)
        for text in TEXTS:
            assert theirs(text)["input_ids"] == ours.encode(text).ids
    chat = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_sentencepiece_scores_order_the_merges(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path, "gemma3", "gemma3")
    # "he" scores best, so "the" is t + he; "th" never forms, and "he" + "t" stay apart
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["the"]
    assert tokenizer.encode("thhe", add_special_tokens=False).tokens == ["th", "he"]
    assert tokenizer.encode(" the 12").tokens == ["<bos>", "▁the", "▁", "12"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode(" é the").ids) == " é the"


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "the 12", ["t", "he", "Ġ", "1", "2"]),
        ("gpt-2", "the 12", ["t", "he", "Ġ", "12"]),
        ("llama-bpe", "the 12", ["t", "he", "Ġ", "12"]),
        ("qwen2", "the 12", ["t", "he", "Ġ", "1", "2"]),
        ("tekken", "the 12", ["t", "he", "Ġ", "1", "2"]),
        ("qwen2", "e\u0301 the", ["Ã", "©", "Ġthe"]),  # NFC: one letter, two bytes
    ],
)
def test_pre_tokenizers(pre: str, text: str, tokens: list[str], tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path, "llama", "llama", pre)
    assert tokenizer.encode(text, add_special_tokens=False).tokens == tokens


@pytest.mark.parametrize(
    ("pre", "extra", "tokens"),
    [
        ("smollm", {}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, ["a"]),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, ["<s>", "a"]),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, ["a", "<|endoftext|>"]),
    ],
)
def test_borders(pre: str, extra: dict[str, bool], tokens: list[str], tmp_path: Path) -> None:
    assert tiny(tmp_path, "llama", "llama", pre, **extra).encode("a").tokens == tokens


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path, "llama", "llama")
    ids = tokenizer.encode("a<tool>b<|im_end|>").ids
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_the_end_of_turn_in_the_template_is_an_eos_too(tmp_path: Path) -> None:
    from pd_serve.models.config import ModelConfig

    tiny(tmp_path, "llama", "llama", **{"tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"})
    assert ModelConfig.from_directory(tmp_path / "out").eos_token_ids == (0, 2)
