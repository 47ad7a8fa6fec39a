"""Engines of several ranks (``--tp``), in pairs with engines of one: the same text, whatever dies or sleeps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, Cluster, Server, children, cluster, wait_for
from tests.e2e.prompts import raw_prompts
from tests.e2e.test_failures import Stream, busy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SIZE = tiny_model.Size(256, 3, 8, 2, 64, 512, 1024)  # heads for which FlashInfer's kernels need no compiler
PROMPTS = [*raw_prompts()[:3], list(range(5, 400))]
TOKENS = 24
LONG = {"cpu": 200, "cuda": 900}  # tokens of streams that are to be cut off


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model"), SIZE)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return str(request.param)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, model: Path, device: str) -> Iterator[Cluster]:
    """A prefill and a decode node of one rank, and one each of two."""
    flags: dict[str, object] = {"kv_cache_memory": "64MiB", "enable_sleep_mode": True, "lease_s": 6, "device": device}
    with cluster(tmp_path_factory.mktemp("tp"), model=model, **flags) as running:
        # four prompts of four hundred tokens leave nothing of what its cache had
        host = {"kv_cache_memory": "2MiB", "host_kv_memory": "16MiB"}
        running.prefills.append(running.start_node("prefill", tp=2, **host))
        running.decodes.append(running.start_node("decode", tp=2))
        running.revive()
        yield running


def texts(running: Cluster) -> list[str]:
    def one(prompt: object, **body: object) -> str:
        return str(running.complete(prompt, TOKENS, **body or {"ignore_eos": True})["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        in_form = pool.submit(one, PROMPTS[0], structured_outputs={"regex": "[a-z]{3,6} [0-9]{3}"}, seed=3)
        return [*pool.map(one, PROMPTS), in_form.result()]


@pytest.fixture(scope="module")
def expected(nodes: Cluster) -> list[str]:
    with nodes.another_router(nodes.prefills[:1], nodes.decodes[:1]) as pair:
        return texts(pair)


def workers(node: Server) -> list[int]:
    """The process of its engine's other rank, which is its first child: one for grammars may follow."""
    return children(int(node.get("/v1/status")["engine"]["pid"]))[:1]


@pytest.mark.parametrize(("source", "reader"), [(1, 0), (0, 1), (1, 1)], ids=["2 to 1", "1 to 2", "2 to 2"])
def test_the_text_of_one_rank(nodes: Cluster, expected: list[str], source: int, reader: int) -> None:
    prefill, decode = nodes.prefills[source], nodes.decodes[reader]
    before = [node.get("/v1/status")["counters"] for node in (prefill, decode)]
    with nodes.another_router([prefill], [decode]) as pair:
        assert texts(pair) == expected
    after = [node.get("/v1/status")["counters"] for node in (prefill, decode)]
    released = before[0]["leases_released"]
    wait_for(lambda: prefill.get("/v1/status")["counters"]["leases_released"] > released, 5, "leases")
    assert after[1]["pull_bytes"] > before[1]["pull_bytes"]
    nodes.assert_idle()


def test_each_rank_has_a_host_tier(nodes: Cluster, expected: list[str]) -> None:
    """What the cache had no room for comes back to both ranks."""
    prefill = nodes.prefills[1]
    with nodes.another_router([prefill], nodes.decodes[:1]) as pair:
        pair.complete(PROMPTS[-1], 2)
        for first in range(6, 10):
            pair.complete(list(range(first, 400)), 2)
        before = prefill.get("/v1/status")["counters"]
        assert texts(pair) == expected
    after = prefill.get("/v1/status")["counters"]
    assert after["host_kv_hit_tokens"] >= before["host_kv_hit_tokens"] + 256
    assert after["host_kv_loaded_blocks"] > before["host_kv_loaded_blocks"] and not after["host_kv_failed_copies"]
    nodes.assert_idle()


def test_a_client_that_leaves(nodes: Cluster) -> None:
    with nodes.another_router(nodes.prefills[1:], nodes.decodes[1:]) as pair:
        stream = Stream(pair, "The sky is blue because", max_tokens=600)
        wait_for(lambda: stream.tokens, 20, "a token")
        stream.abort()
        nodes.assert_idle()


def test_ranks_sleep_and_wake_together(nodes: Cluster, expected: list[str]) -> None:
    prefill, decode = nodes.prefills[1], nodes.decodes[1]
    for level in (1, 2):
        for path, sleeping in ((f"/sleep?level={level}", True), ("/wake_up", False)):
            for node in (prefill, decode):
                answer = HTTP.post(node.url + path, timeout=60)
                assert answer.json().get("is_sleeping") is sleeping, answer.text + node.log.read_text()[-3000:]
        with nodes.another_router([prefill], [decode]) as pair:
            assert texts(pair) == expected
    nodes.assert_idle()


def test_a_rank_that_dies_takes_its_engine_and_streams_go_on(nodes: Cluster, device: str) -> None:
    """Also while it sleeps, when nothing is asked of it."""
    prompt = "Once upon a time"
    text = str(nodes.complete(prompt, LONG[device], ignore_eos=True)["choices"][0]["text"])
    idle = nodes.prefills[1]
    (pid,) = workers(idle)
    assert HTTP.post(f"{idle.url}/sleep?level=1", timeout=60).json()["is_sleeping"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: idle.process.poll() is not None, 10, "the end of the prefill node")
    assert "rank 1 has ended" in idle.log.read_text()
    victim = nodes.decodes[1]
    (pid,) = workers(victim)
    streams = [Stream(nodes, prompt, max_tokens=LONG[device]) for _ in range(6)]
    wait_for(lambda: all(len(stream.tokens) > 5 for stream in streams), 60, "tokens")
    assert busy(nodes, [victim]) is victim
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        stream.wait()
        assert stream.error is None and stream.text == text
    wait_for(lambda: victim.process.poll() is not None, 10, "the end of the decode node")
    nodes.prefills.pop()
    nodes.decodes.pop()
    nodes.assert_idle()


def test_what_cannot_be_dealt_is_said(tmp_path: Path, model: Path) -> None:
    node = Server("node", {"device": "cpu", "model": model, "tp": 3, "port": 0}, tmp_path / "node.log")
    assert node.process.wait(60) != 0
    assert "--tp 3 does not divide the model's KV heads, 2" in node.log.read_text()
