"""What a router needs to know of a model to tokenise, to apply its chat template and to detokenise.

A node sends its ``ModelBundle`` over the link to a router that asks for it; a router asks once for each model
fingerprint and text. Built from the files of a HuggingFace directory without torch or transformers, so that a
router needs no model directory of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from pd_serve.errors import ModelError
from pd_serve.wire.model_files import chat_templates, read_json, sampling_defaults, special_tokens


class ModelBundle(msgspec.Struct, frozen=True):
    """The text side of a model. ``generation_defaults`` stand in for what a request does not say; a node that is
    told to leave them out sends none, so that one place decides."""

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


def bundle_from_directory(
    path: str | Path,
    *,
    name: str = "",
    fingerprint: str = "",
    chat_template: str = "",
    generation_config: str = "auto",
) -> ModelBundle:
    """Reads a model directory in HuggingFace form.

    ``chat_template`` takes the place of all that the model has; ``generation_config`` "none" leaves out its sampling
    defaults. Raises ModelError when ``tokenizer.json`` is missing or one of the files cannot be read.
    """
    root = Path(path)
    tokenizer = root / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{root} has no tokenizer.json: only models with a fast (tokenizers) tokenizer can be served")
    config = read_json(root / "tokenizer_config.json")
    add_bos = config.get("add_bos_token")
    return ModelBundle(
        name=name or root.name,
        fingerprint=fingerprint,
        tokenizer_json=tokenizer.read_bytes(),
        chat_templates={"default": chat_template} if chat_template else chat_templates(root, config),
        special_tokens=special_tokens(root, config),
        add_bos_token=add_bos if isinstance(add_bos, bool) else None,
        generation_defaults=sampling_defaults(root) if generation_config == "auto" else {},
    )
