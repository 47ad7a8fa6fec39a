"""A prefill and a decode node whose blocks differ in size: the text stays the model's, whatever is cached already."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api import tiny
from tests.e2e import reference
from tests.e2e.cluster import Cluster, cluster
from tests.models.reference import make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

WINDOW, LENGTH, VOCAB = 512, 2048, 512
PROMPTS = [random.Random(length).choices(range(5, 400), k=length) for length in (5, 170, 700)]
TOKENS = 12


def sizes(prefill: int, decode: int) -> dict[str, dict[str, object]]:
    return {"prefill": {"block_size": prefill}, "decode": {"block_size": decode}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sliding windows."""
    directory = tmp_path_factory.mktemp("model") / "gemma"
    changes = {"sliding_window": WINDOW, "max_position_embeddings": LENGTH, "vocab_size": VOCAB}
    make_tiny("gemma3", directory, changes)
    (directory / "tokenizer.json").write_bytes(tiny.byte_level())
    return directory


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("sizes"), only=sizes(16, 64), model=model) as made:
        yield made


def texts(running: Cluster) -> list[list[int]]:
    """Token ids of the answer to each prompt."""
    answers = [running.complete(prompt, TOKENS, ignore_eos=True, return_token_ids=True) for prompt in PROMPTS]
    return [answer["choices"][0]["token_ids"] for answer in answers]


def check(running: Cluster, directory: Path) -> None:
    decode = running.decodes[0]
    computed = texts(running)
    for prompt, output in zip(PROMPTS, computed, strict=True):
        assert reference.first_difference(directory, prompt, output) is None, len(prompt)
    assert texts(running) == computed  # with prefixes cached on both nodes, at different places
    running.assert_idle()
    counters = decode.get("/v1/status")["counters"]
    assert counters["pulls"] >= 2 * len(PROMPTS) and counters["prefix_hit_tokens"] > 0
    assert counters["checksum_bytes"] == counters["pull_bytes"] > 0
    assert counters["pull_failures_checksum"] == counters["transfer_faults"] == 0


def test_large_blocks_pull_from_small_ones(running: Cluster, model: Path) -> None:
    check(running, model)


def test_small_blocks_pull_from_large_ones(running: Cluster, model: Path) -> None:
    for server in running.nodes:
        server.kill()
    running.only = sizes(64, 16)
    running.revive()
    check(running, model)
