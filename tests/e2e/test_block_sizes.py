"""A prefill and a decode node whose blocks differ in size: the text stays the model's, whatever is cached already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import reference
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.prompts import raw_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROMPTS = [raw_prompts()[i] for i in (0, 13, 20)]  # 5, 170 and 700 tokens; the window is 512
TOKENS = 12


def sizes(prefill: int, decode: int) -> dict[str, dict[str, object]]:
    return {"prefill": {"block_size": prefill}, "decode": {"block_size": decode}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, gemma3: Path) -> Iterator[Cluster]:
    """A model with sliding windows."""
    directory = tmp_path_factory.mktemp("sizes")
    with cluster(directory, only=sizes(16, 64), model=gemma3, max_model_len=2048) as made:
        yield made


def texts(running: Cluster) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and its answer."""
    found = []
    for prompt in PROMPTS:
        answer = running.complete(prompt, TOKENS, ignore_eos=True, return_token_ids=True)
        choice = answer["choices"][0]
        found.append((choice.get("prompt_token_ids") or answer["prompt_token_ids"], choice["token_ids"]))
    return found


def check(running: Cluster, directory: Path) -> None:
    decode = running.decodes[0]
    computed = texts(running)
    for prompt, output in computed:
        assert reference.first_difference(directory, prompt, output) is None, len(prompt)
    assert texts(running) == computed  # with prefixes cached on both nodes, at different places
    running.assert_idle()
    counters = decode.get("/v1/status")["counters"]
    assert counters["pulls"] >= 2 * len(PROMPTS) and counters["prefix_hit_tokens"] > 0
    assert counters["checksum_bytes"] == counters["pull_bytes"] > 0
    assert counters["pull_failures_checksum"] == counters["transfer_faults"] == 0


def test_large_blocks_pull_from_small_ones(running: Cluster, gemma3: Path) -> None:
    check(running, gemma3)


def test_small_blocks_pull_from_large_ones(running: Cluster, gemma3: Path) -> None:
    for server in running.nodes:
        server.kill()
    running.only = sizes(64, 16)
    running.revive()
    check(running, gemma3)
