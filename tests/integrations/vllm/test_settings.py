"""pd-serve's settings out of vLLM's configuration."""

from __future__ import annotations

import pytest

from pd_serve.errors import ConfigError
from pd_serve.integrations.vllm.settings import load


def test_names_and_kinds_are_those_of_a_node() -> None:
    loaded = load({"lease_s": 12, "checksums": False, "nixl_options": {"a": 1}}, sends=True, receives=True)
    assert (loaded.lease_s, loaded.checksums, loaded.nixl_options, loaded.role) == (12.0, False, ("a=1",), "both")
    assert loaded.peer_host == "127.0.0.1"
    assert load({}, sends=False, receives=True).role == "decode"


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"lease": 3}, "did you mean 'lease_s'"),
        ({"max_num_seqs": 3}, "there is no 'max_num_seqs'"),
        ({"transport": "pigeon"}, "pigeon"),
        ({"peer_host": "10.0.0.7"}, "secret"),
    ],
)
def test_what_is_wrong_is_said(extra: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(extra, sends=True, receives=True)
