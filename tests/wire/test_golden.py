"""What is said between processes does not change by accident (see :mod:`tests.wire.golden`)."""

from __future__ import annotations

import typing
from types import ModuleType

import msgspec
import pytest

from pd_serve.wire import engine, link, peer
from tests.wire import golden

EXAMPLES = dict(golden.examples())
BYTES = {name: bytes.fromhex(hex) for name, hex in (line.split(": ") for line in golden.FILE.read_text().splitlines())}


def test_every_message_has_its_bytes() -> None:
    assert list(BYTES) == list(EXAMPLES), "run python -m tests.wire.golden"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_is_encoded_as_ever(name: str) -> None:
    example = EXAMPLES[name]
    assert msgspec.msgpack.encode(example) == BYTES[name], "another version? then: python -m tests.wire.golden"
    assert msgspec.msgpack.decode(BYTES[name], type=type(example)) == example


@pytest.mark.parametrize(
    ("module", "union", "decoder"),
    [
        (link, "ToNode", "decode_to_node"),
        (link, "FromNode", "decode_from_node"),
        (engine, "ToEngine", "decode_to_engine"),
        (engine, "FromEngine", "decode_from_engine"),
        (peer, "ToSource", "decode_to_source"),
        (peer, "ToReader", "decode_to_reader"),
    ],
)
def test_who_hears_it_knows_which_it_is(module: ModuleType, union: str, decoder: str) -> None:
    kinds = typing.get_args(getattr(module, union))
    heard = [name for name, example in EXAMPLES.items() if isinstance(example, kinds)]
    assert len(heard) >= len(kinds)
    for name in heard:
        assert getattr(module, decoder)(BYTES[name]) == EXAMPLES[name]
