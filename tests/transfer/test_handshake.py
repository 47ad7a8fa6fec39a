from __future__ import annotations

import dataclasses

import pytest

from pd_serve.transfer.handshake import Identity, answer, hello
from pd_serve.wire.peer import Refused, Welcome

P = Identity("P", "e1", "model-a", "layout-a", "16 tokens", ("nvlink", "nixl"), 1, 3)
D = Identity("D", "e2", "model-a", "layout-a", "16 tokens", ("nixl", "nvlink"), 2, 5)


def test_settles_on_the_newest_protocol_and_the_callers_favourite() -> None:
    reply = answer(P, hello(D), b"endpoint", 12.0)
    assert reply == Welcome(3, "P", "e1", "nixl", b"endpoint", 12.0)


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"protocol_min": 4, "protocol_max": 5}, ("1..3", "4..5")),
        ({"protocol_min": 0, "protocol_max": 0}, ("1..3", "0..0")),
        ({"model": "model-b"}, ("model-a", "model-b")),
        ({"layout": "layout-b", "layout_text": "32 tokens"}, ("layout-a", "16 tokens", "layout-b", "32 tokens")),
        ({"transports": ("ucx",)}, ("nvlink, nixl", "ucx")),
        ({"transports": ()}, ("none",)),
    ],
)
def test_refuses_with_both_values(change: dict[str, object], both: tuple[str, ...]) -> None:
    reply = answer(P, hello(dataclasses.replace(D, **change)), b"", 12.0)
    assert isinstance(reply, Refused)
    for value in (*both, "P", "D"):
        assert value in reply.reason
