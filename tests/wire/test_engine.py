from __future__ import annotations

from typing import get_type_hints

import msgspec

from pd_serve.wire.engine import EngineConfig


def test_a_printed_configuration_does_not_show_the_secret() -> None:
    examples = {str: "x", int: 1, float: 1.0, bool: True, list[int]: [], dict[str, str]: {}}
    values = {name: examples[kind] for name, kind in get_type_hints(EngineConfig).items()}
    config = msgspec.convert({**values, "secret": "s3cret", "role": "decode"}, EngineConfig)
    for text in (repr(config), str(config), f"{config}"):
        assert "s3cret" not in text and "decode" in text
    assert b"s3cret" in msgspec.json.encode(config)  # it travels on the engine's standard input
