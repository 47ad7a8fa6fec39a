"""Sleep with real engines: memory goes, routers go on without the node, and the same text comes afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import HTTP, Cluster, Server, cluster, wait_for
from tests.e2e.prompts import raw_prompts
from tests.e2e.test_failures import Stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROMPT = raw_prompts()[14]
KV_BYTES = 256 << 20


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    with cluster(
        tmp_path_factory.mktemp("sleep"),
        router={"node_wait_s": 0.5},
        model=small_model,
        kv_cache_memory=KV_BYTES,
        enable_sleep_mode=True,
        drain_timeout_s=3,
    ) as running:
        yield running


def post(node: Server, path: str, **options: Any) -> dict[str, Any]:
    answer = HTTP.post(node.url + path, timeout=60, **options)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ask(nodes: Cluster) -> httpx.Response:
    body = {"model": nodes.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return HTTP.post(f"{nodes.url}/v1/completions", json=body, timeout=60)


def text(nodes: Cluster) -> str:
    return str(nodes.complete(PROMPT, max_tokens=12)["choices"][0]["text"])


def resident(node: Server) -> int:
    """Private bytes of a node's engine: files that are mapped and shared are not counted."""
    pid = node.get("/v1/status")["engine"]["pid"]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def settled(node: Server) -> int:
    """Resident bytes once the kernel has backed the whole pool, which it does in small steps after the start."""
    before = 0
    while (now := resident(node)) > before:
        before = now
        time.sleep(0.3)
    return now


def linked(nodes: Cluster) -> set[str]:
    return {node["url"] for node in nodes.router.get("/v1/status")["nodes"] if node["state"] == "ready"}


def test_a_decode_node_sleeps_and_wakes(nodes: Cluster) -> None:
    decode = nodes.decodes[0]
    expected = text(nodes)
    epoch = decode.get("/v1/status")["engine"]["epoch"]
    full = settled(decode)
    memory = next(n for n in nodes.router.get("/v1/status")["nodes"] if n["role"] == "decode")["memory"]
    assert memory["tags"]["kv_cache"]["reserved_bytes"] >= KV_BYTES * 0.99

    assert post(decode, "/sleep?level=1")["is_sleeping"]
    assert full - resident(decode) > 0.95 * KV_BYTES
    wait_for(lambda: decode.url not in linked(nodes), 5, "the router without the node")
    refused = ask(nodes)
    assert refused.status_code == 503
    assert "no decode node" in refused.json()["error"]["message"]
    assert "pd_serve_node_sleeping 1.0" in HTTP.get(decode.url + "/metrics").text

    assert not post(decode, "/wake_up")["is_sleeping"]
    wait_for(lambda: decode.url in linked(nodes), 5, "the node is back")
    assert text(nodes) == expected
    assert decode.get("/v1/status")["engine"]["epoch"] != epoch
    nodes.assert_idle()
    assert 'pd_serve_router_node_memory_bytes{device="cpu",node=' in HTTP.get(nodes.url + "/metrics").text


def test_a_prefill_node_sleeps_at_level_2_and_wakes_by_tags(nodes: Cluster) -> None:
    prefill = nodes.prefills[0]
    expected = text(nodes)
    weights = prefill.get("/v1/status")["memory"]["tags"]["weights"]["bytes"]
    full = settled(prefill)

    assert post(prefill, "/sleep", json={"level": 2})["asleep"] == ["weights", "kv_cache"]
    assert full - resident(prefill) > 0.95 * KV_BYTES + 0.5 * weights  # the embedding is mapped
    wait_for(lambda: prefill.url not in linked(nodes), 5, "the router without the node")
    assert text(nodes) == expected  # the decode node computes the prompt

    assert post(prefill, "/wake_up?tags=weights")["asleep"] == ["kv_cache"]
    assert prefill.url not in linked(nodes)
    assert not post(prefill, "/wake_up?tags=kv_cache")["is_sleeping"]
    wait_for(lambda: prefill.url in linked(nodes), 5, "the node is back")
    leases = prefill.get("/v1/status")["counters"]["leases_released"]
    assert text(nodes) == expected
    wait_for(
        lambda: prefill.get("/v1/status")["counters"]["leases_released"] > leases, 5, "a prompt pulled from the node"
    )
    nodes.assert_idle()


def test_a_stream_waits_out_the_sleep_of_its_node(nodes: Cluster) -> None:
    """It has time to end; then the node sleeps. A longer one is cut off after drain_timeout_s and told so."""
    decode = nodes.decodes[0]
    short = Stream(nodes, PROMPT, max_tokens=40)
    wait_for(lambda: short.tokens, 20, "a token")
    assert post(decode, "/sleep")["is_sleeping"]
    assert short.wait().error is None and len(short.tokens) == 40
    post(decode, "/wake_up")
    wait_for(lambda: decode.url in linked(nodes), 5, "the node is back")

    long = Stream(nodes, PROMPT, max_tokens=2000)
    wait_for(lambda: long.tokens, 20, "a token")
    assert post(decode, "/sleep")["is_sleeping"]
    error = long.wait().error
    assert error is not None and error["code"] == "no_nodes"
    assert not post(decode, "/wake_up")["is_sleeping"]
    wait_for(lambda: decode.url in linked(nodes), 5, "the node is back")
    nodes.assert_idle()
