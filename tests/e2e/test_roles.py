"""Nodes of both roles, and roles that are switched while streams run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import HTTP, Cluster, Server, cluster, wait_for
from tests.e2e.prompts import raw_prompts
from tests.e2e.test_failures import Stream, busy, expected

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = raw_prompts()[20]
TOKENS = 100


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("both")
    with cluster(directory, prefill=0, decode=0, both=2, model=small_model, kv_cache_memory="128MiB") as running:
        yield running


def take(node: Server, role: str) -> None:
    answer = HTTP.post(f"{node.url}/role", json={"role": role})
    assert answer.status_code == 200 and answer.json()["role"] == role, answer.text


def roles(nodes: Cluster) -> list[str]:
    """As the router sees them."""
    found = {node["url"]: node.get("role", "") for node in nodes.router.get("/v1/status")["nodes"]}
    return [found[node.url] for node in nodes.boths]


def pulls(node: Server) -> float:
    counters = node.get("/v1/status")["counters"]
    assert counters["transfer_faults"] == 0
    return float(counters["pulls"])


def retries(nodes: Cluster) -> list[str]:
    """What the router has counted of them, by reason."""
    lines = HTTP.get(f"{nodes.url}/metrics").text.splitlines()
    return [line for line in lines if line.startswith("pd_serve_retries_total")]


def streams_to_the_end(streams: list[Stream], text: str) -> None:
    for stream in streams:
        stream.wait()
        assert stream.error is None
        assert (stream.text, len(stream.tokens)) == (text, TOKENS)


def test_one_alone_answers(nodes: Cluster) -> None:
    with nodes.another_router([], nodes.boths[:1], min_prefill=1) as alone:
        assert alone.router.get("/v1/status")["models"][0]["prefill"] == 1
        assert expected(alone, PROMPT, TOKENS) == expected(nodes, PROMPT, TOKENS)
    nodes.assert_idle()


def test_one_of_two_is_killed(nodes: Cluster) -> None:
    text = expected(nodes, PROMPT, TOKENS)
    streams = [Stream(nodes, max_tokens=TOKENS) for _ in range(6)]
    victim = wait_for(lambda: all(len(s.tokens) > 3 for s in streams) and busy(nodes, nodes.boths), 60, "tokens")
    victim.kill()
    streams_to_the_end(streams, text)
    nodes.assert_idle()
    nodes.revive()


def test_roles_are_switched_under_load(nodes: Cluster) -> None:
    """Both nodes to one role each, then the other way round, then both again: no stream is lost or changed."""
    text = expected(nodes, PROMPT, TOKENS)
    before, pulled = retries(nodes), [pulls(node) for node in nodes.boths]
    first, second = nodes.boths
    running: list[Stream] = []
    for wanted in (("prefill", "decode"), ("decode", "prefill"), ("both", "both")):
        running += [Stream(nodes, max_tokens=TOKENS) for _ in range(4)]
        wait_for(lambda streams=running: all(len(s.tokens) > 3 for s in streams), 60, "tokens")
        # never without a decode node
        for node, role in sorted(zip((first, second), wanted, strict=True), key=lambda one: one[1] == "prefill"):
            take(node, role)
        wait_for(lambda wanted=wanted: roles(nodes) == [*wanted], 10, f"roles {wanted}")
        time.sleep(0.1)
    streams_to_the_end(running, text)
    assert [node["state"] for node in nodes.router.get("/v1/status")["nodes"]] == ["ready", "ready"]
    assert retries(nodes) == before, "an attempt was begun anew"
    assert all(
        pulls(node) > count for node, count in zip(nodes.boths, pulled, strict=True)
    )  # each has read what the other computed
    nodes.assert_idle()


def test_a_role_that_is_none_is_refused(nodes: Cluster) -> None:
    answer = HTTP.post(f"{nodes.boths[0].url}/role", json={"role": "router"})
    assert answer.status_code == 400 and "role is one of prefill, decode, both" in answer.json()["error"]
