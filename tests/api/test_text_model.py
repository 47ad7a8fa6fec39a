"""Model bundles from directories, BOS, and the real tokenizers: what the router tokenises is what transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pd_serve.api.detokenizer import Detokenizer
from pd_serve.api.parsing import parse
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.api.text_model import TextModel
from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.errors import ModelError
from pd_serve.wire.link import ModelInfo
from pd_serve.wire.model import bundle_from_directory, decode_bundle, encode_bundle
from tests.api import tiny


def write(root: Path, **files: object) -> Path:
    (root / "tokenizer.json").write_bytes(tiny.byte_level())
    for name, content in files.items():
        (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def test_everything_in_a_directory(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={
            "bos_token": {"content": "<|start|>", "lstrip": False},
            "eos_token": "<|end|>",
            "add_bos_token": False,
            "chat_template": [
                {"name": "default", "template": "old"},
                {"name": "tool_use", "template": "tools"},
            ],
        },
        special_tokens_map={"eos_token": "<other>", "pad_token": "<|end|>"},
        generation_config={"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": [0]},
    )
    (tmp_path / "chat_template.jinja").write_text("new")
    bundle = bundle_from_directory(tmp_path, name="m", fingerprint="f")
    assert decode_bundle(encode_bundle(bundle)) == bundle
    assert (bundle.name, bundle.fingerprint, bundle.add_bos_token) == ("m", "f", False)
    assert bundle.chat_templates == {"default": "new", "tool_use": "tools"}
    assert bundle.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    assert bundle.generation_defaults == {"temperature": 0.6, "top_k": 20.0}


def test_chat_templates_of_every_file(tmp_path: Path) -> None:
    """The more special file wins, as in transformers."""
    write(tmp_path, tokenizer_config={"chat_template": "a"}, chat_template={"chat_template": "b"})
    assert bundle_from_directory(tmp_path).chat_templates == {"default": "b"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("d")
    (tmp_path / "chat_template.jinja").write_text("c")
    assert bundle_from_directory(tmp_path).chat_templates == {"default": "c", "rag": "d"}
    assert bundle_from_directory(tmp_path, chat_template="mine").chat_templates == {"default": "mine"}
    with pytest.raises(ModelError, match=r"chat_template\.json.*--chat-template"):
        bundle_from_directory(write(tmp_path, chat_template={"chat_template": 5}))


@pytest.mark.parametrize(
    ("generation", "defaults", "warned"),
    [
        ({"temperature": 0.0, "top_k": 1, "do_sample": True}, {"temperature": 0.0, "top_k": 1.0}, ""),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}, ""),
        ({"temperature": None, "top_p": 0.9, "max_length": 20}, {"top_p": 0.9}, ""),
        ({"temperature": -1, "min_p": 0.1}, {"min_p": 0.1}, "temperature"),
        ({"top_p": "0.9"}, {}, "top_p"),
        ({"top_k": 2.5}, {}, "top_k"),
        ({"repetition_penalty": float("nan"), "do_sample": "no"}, {}, "do_sample"),
    ],
)
def test_sampling_defaults(
    generation: object, defaults: object, warned: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, generation_config=generation)
    assert bundle_from_directory(tmp_path).generation_defaults == defaults
    assert warned in caplog.text and bool(warned) == bool(caplog.text)
    assert bundle_from_directory(tmp_path, generation_config="none").generation_defaults == {}


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        bundle_from_directory(tmp_path)
    assert bundle_from_directory(write(tmp_path)).chat_templates == {}
    for broken in ("{", "[]"):
        with pytest.raises(ModelError, match="tokenizer_config"):
            bundle_from_directory(write(tmp_path, tokenizer_config=broken))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextTokenizer(b"{}")


def test_bos_is_added_once() -> None:
    plain = TextTokenizer(tiny.byte_level(), bos_token="<|start|>", add_bos_token=None)
    adding = TextTokenizer(tiny.byte_level(), bos_token="<|start|>", add_bos_token=True)
    bos = tiny.SPECIALS.index("<|start|>")
    assert adding.encode("the", add_special_tokens=True) == [bos, *plain.encode("the", add_special_tokens=True)]
    assert adding.encode("the", add_special_tokens=False) == plain.encode("the", add_special_tokens=False)


def text_model(directory: Path, vocab_size: int) -> TextModel:
    return TextModel(bundle_from_directory(directory), ModelInfo("m", "f", 8192, vocab_size, [2]))


TEXTS = [
    "Hello, world!",
    " two  spaces\n\n\ttab 1234567",
    "naïve café — 東京 " + tiny.EMOJI,
    "<|im_start|>user\n</s><bos>",
]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_tokenizers(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    ours = text_model(directory, 300_000).tokenizer
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert ours.exact
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text).ids
        for skip in (True, False):
            detokenizer = Detokenizer(ours, skip_special_tokens=skip)
            streamed = "".join(detokenizer.push([id]) for id in ids) + detokenizer.finish()
            assert streamed == theirs.decode(ids, skip_special_tokens=skip)
    if name == "gemma3":
        assert ours.encode("x", add_special_tokens=True)[0] == theirs.token_to_id("<bos>")


def test_any_tokens_of_a_real_vocabulary(smollm2: Path) -> None:
    tokenizer = text_model(smollm2, 49152).tokenizer

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, 49151), max_size=40))
    def check(ids: list[int]) -> None:
        detokenizer = Detokenizer(tokenizer)
        streamed = "".join(detokenizer.push([id]) for id in ids) + detokenizer.finish()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True)

    check()


def test_a_real_chat_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "  Hi <there> \n"}, {"role": "assistant", "content": "Yes?"}]
    messages += [{"role": "user", "content": "Grüße"}]
    body = json.dumps({"messages": messages}).encode()
    prompt = text_model(smollm2, 49152).chat_prompt(parse(ChatCompletionRequest, body))
    theirs = AutoTokenizer.from_pretrained(str(smollm2))
    assert prompt.text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.ids == theirs(prompt.text, add_special_tokens=False)["input_ids"]
