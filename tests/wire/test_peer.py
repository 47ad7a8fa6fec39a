"""What every version of the peer protocol understands. The messages' bytes: tests/wire/test_golden.py."""

from __future__ import annotations

import msgspec
import pytest

from pd_serve.wire import peer as wire


@pytest.mark.parametrize("also", [{}, {"nonce": b"n" * 32, "lanes": {}, "node_id": "D"}])
def test_every_hello_says_its_versions(also: dict[str, object]) -> None:
    frame = msgspec.msgpack.encode({"type": "hello", "protocol_min": 1, "protocol_max": 2, **also})
    assert wire.decode_version(frame) == wire.Version(1, 2)
