"""Prompts that have left the KV cache come back out of the host tier: same text, nothing computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import HTTP, Cluster, Server, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROMPTS = [[40 + (7 * start + at * start) % 200 for at in range(300)] for start in (1, 2, 3, 4)]


def texts(system: Cluster) -> tuple[list[str], list[int]]:
    """And how many tokens of each prompt were cached."""
    answers = [system.complete(prompt, 12, ignore_eos=True) for prompt in PROMPTS]
    cached = [int(a["usage"]["prompt_tokens_details"]["cached_tokens"]) for a in answers]
    return [a["choices"][0]["text"] for a in answers], cached


def counters(node: Server) -> dict[str, Any]:
    return dict(node.get("/v1/status")["counters"])


def test_the_same_text_out_of_the_host_tier(tmp_path: Path, small_model: Path) -> None:
    """Pools of two prompts. The prefill node's tier is eager, and it leases what it brought back; the decode node's is
    lazy and a file, for prompts that it computes when it serves alone."""
    flags: dict[str, object] = {"max_model_len": 512, "kv_cache_memory": "2MiB", "max_num_batched_tokens": 128}
    flags |= {"host_kv_memory": "8MiB"}
    lazy: dict[str, object] = {"host_kv_mode": "lazy", "host_kv_path": tmp_path / "kv"}
    with cluster(tmp_path, model=small_model, only={"decode": lazy}, **flags) as system:
        computed, cached = texts(system)
        assert max(cached) < 64
        [prefill], [decode] = system.prefills, system.decodes
        with system.another_router([], [decode]) as alone:
            for front, node in ((system, prefill), (alone, decode)):
                HTTP.post(f"{decode.url}/reset_prefix_cache")
                assert texts(front)[0] == computed
                again, cached = texts(front)
                assert again == computed
                assert min(cached) >= 288, "whole blocks of a prompt are there"
                seen = counters(node)
                assert seen["host_kv_hit_tokens"] > 3 * 256 and not seen["host_kv_failed_copies"]
        assert "pd_serve_node_host_kv_blocks" in HTTP.get(f"{prefill.url}/metrics").text
        assert HTTP.post(f"{prefill.url}/reset_prefix_cache").json() == {"reset": True}
        assert HTTP.post(f"{prefill.url}/reset_prefix_cache?all=1").status_code == 400
        before = counters(prefill)["host_kv_hit_tokens"]
        assert system.complete(PROMPTS[0], 12, ignore_eos=True)["choices"][0]["text"] == computed[0]
        assert counters(prefill)["host_kv_hit_tokens"] == before
        system.assert_idle()
