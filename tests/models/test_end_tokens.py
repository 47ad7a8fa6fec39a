"""What ends a text: every file that names such a token, and nothing that only looks like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pd_serve.errors import ModelError
from pd_serve.models.config import ModelConfig
from pd_serve.models.end_tokens import tokenizer_end_ids
from pd_serve.wire.model import bundle_from_directory
from tests.models.reference import SIZES

CONFIG = {**SIZES, "architectures": ["LlamaForCausalLM"]}
ADDED = [
    {"id": 2, "content": "</s>", "special": True},
    {"id": 7, "content": "<|im_end|>", "special": True},
    {"id": 8, "content": "<|eot_id|>", "special": False},
    {"id": 9, "content": "<end_of_turn>", "special": True},
]
TOKENIZER = {"added_tokens": ADDED, "model": {"type": "BPE", "vocab": {"a": 0, "<plain>": 5}, "merges": []}}
TEMPLATE = "{{ messages }}<|im_end|><|eot_id|>"


def write(root: Path, **files: Any) -> Path:
    for name, content in {"config": CONFIG, "tokenizer": TOKENIZER, **files}.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def ids(root: Path, **files: Any) -> tuple[int, ...]:
    return ModelConfig.from_directory(write(root, **files)).eos_token_ids


def test_all_files_count(tmp_path: Path) -> None:
    assert ids(tmp_path) == (2,)  # config.json's
    assert ids(tmp_path, generation_config={"eos_token_id": [2, 11]}) == (2, 11)
    assert ids(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}}) == (2, 11, 7)
    assert ids(tmp_path, tokenizer_config={"eos_token": "<plain>"}) == (2, 11, 5)
    assert ids(tmp_path, tokenizer_config={}, special_tokens_map={"eos_token": "<end_of_turn>"}) == (2, 11, 9)


@pytest.mark.parametrize("listed", [True, False])
def test_a_turn_ends_where_the_template_writes_a_special_token_that_is_known_to_end_one(
    listed: bool, tmp_path: Path
) -> None:
    """<|eot_id|> is written but not special, <end_of_turn> is special but not written."""
    config: dict[str, Any] = {"eos_token": "</s>", "chat_template": TEMPLATE}
    if listed:
        config["added_tokens_decoder"] = {str(entry["id"]): entry for entry in ADDED}
    assert ids(tmp_path, tokenizer_config=config) == (2, 7)
    assert tokenizer_end_ids(tmp_path, "{{ messages }}<end_of_turn>") == (2, 9)  # --chat-template
    assert ids(tmp_path, tokenizer_config={"eos_token": "</s>"}, chat_template={"chat_template": TEMPLATE}) == (2, 7)


def test_a_directory_without_tokenizer_has_those_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2,)


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**33), st.floats(), st.sampled_from(["", "<plain>", "x"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "id", "7"]), inner),
    max_leaves=5,
)
_KEYS = [
    "eos_token", "eos_token_id", "chat_template", "added_tokens_decoder", "added_tokens", "model", "add_bos_token",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample",
]  # fmt: skip
_FILE = st.one_of(_JSON, *[st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4)] * 3)


@given(
    files=st.dictionaries(
        st.sampled_from(["generation_config", "tokenizer_config", "special_tokens_map", "chat_template", "tokenizer"]),
        _FILE,
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_a_model_or_a_model_error(files: dict[str, Any], tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path, **files)
    for read in (ModelConfig.from_directory, bundle_from_directory):
        try:
            read(tmp_path)
        except ModelError:
            pass
