"""Real engines tell a real router what they have cached, and a prompt that comes again goes where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import HTTP, Cluster, cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def known(system: Cluster, what: str = "known_prefixes") -> dict[str, Any]:
    nodes = HTTP.get(f"{system.url}/v1/status", timeout=20).json()["nodes"]
    return {node["url"]: node[what] for node in nodes}


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_prompt_goes_where_it_is_cached(tmp_path: Path, small_model: Path) -> None:
    flags: dict[str, object] = {"max_model_len": 2048, "kv_cache_memory": "64MiB"}
    with cluster(tmp_path, model=small_model, prefill=2, decode=1, **flags) as system:
        prompts = [[40 + (7 * start + at) % 200 for at in range(1200)] for start in (1, 2, 3, 4)]
        assert set(known(system).values()) == {0}
        for prompt in prompts:
            assert cached(system.complete(prompt, 4)) < 64
        wait_for(lambda: sum(known(system)[node.url] for node in system.prefills) == 8, 10, "two names of each prompt")
        assert known(system)[system.decodes[0].url] == 8, "what was pulled is cached there, too"
        rates = known(system, "prompt_tokens_a_second")
        assert any(rates[node.url] for node in system.prefills), "what --ttft-objective-ms refuses by"
        for prompt in prompts:
            # a router that thinks that a whole prompt waits there has this one computed elsewhere, rightly
            wait_for(lambda: not any(load["waiting_tokens"] for load in known(system, "load").values()), 10, "no load")
            assert cached(system.complete(prompt, 4)) > 1024
        assert sum(known(system)[node.url] for node in system.prefills) == 8, "nobody computed what another one had"
        system.assert_idle()
