"""One request, one text: however it was computed, greedy or seeded."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, cluster
from tests.e2e.prompts import raw_prompts
from tests.e2e.tiny_model import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMPTS = [raw_prompts()[i] for i in (0, 3, 13, 17, 20)]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234}
KINDS: dict[str, dict[str, object]] = {"greedy": {}, "sampled": SAMPLED}
TOKENS = 24

Texts = dict[str, list[str]]


def texts(cluster: Cluster) -> Texts:
    return {
        kind: [cluster.complete(p, TOKENS, ignore_eos=True, **extra)["choices"][0]["text"] for p in PROMPTS]
        for kind, extra in KINDS.items()
    }


@pytest.fixture(scope="module")
def pd(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("pd"), model=small_model) as running:
        yield running


@pytest.fixture(scope="module")
def baseline(pd: Cluster) -> Texts:
    return texts(pd)


def test_prefix_cache_hits(pd: Cluster, baseline: Texts) -> None:
    before = pd.decodes[0].get("/v1/status")["counters"]["prefix_hit_tokens"]
    assert texts(pd) == baseline
    assert pd.decodes[0].get("/v1/status")["counters"]["prefix_hit_tokens"] > before
    pd.assert_idle()


def test_a_batch_of_sixteen(pd: Cluster, baseline: Texts) -> None:
    jobs = [(kind, i) for kind in KINDS for i in range(len(PROMPTS))]
    noise = [("noise", i) for i in range(16 - len(jobs))]

    def run(job: tuple[str, int]) -> str:
        kind, i = job
        if kind == "noise":
            return str(pd.complete(f"Noise {i}:", TOKENS, temperature=1.3, ignore_eos=True)["choices"][0]["text"])
        return str(pd.complete(PROMPTS[i], TOKENS, ignore_eos=True, **KINDS[kind])["choices"][0]["text"])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, jobs + noise))
    for (kind, i), text in zip(jobs, answers, strict=False):
        assert text == baseline[kind][i]
    pd.assert_idle()


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """A pair that computes all prompts anew, short ones on the decode node."""
    flags: dict[str, object] = {"prefix_caching": False, "local_prefill_tokens": 64}
    with cluster(tmp_path_factory.mktemp("uncached"), model=small_model, **flags) as running:
        yield running


def test_one_node_alone(uncached: Cluster, baseline: Texts) -> None:
    with uncached.another_router([], uncached.decodes) as alone:
        assert texts(alone) == baseline
    uncached.assert_idle()


def test_short_prompts_on_the_decode_node(uncached: Cluster, baseline: Texts) -> None:
    assert texts(uncached) == baseline
    counters = uncached.prefills[0].get("/v1/status")["counters"]
    assert 0 < counters["requests"] < 2 * len(PROMPTS)
    uncached.assert_idle()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """A pair whose steps take a block and a half, and whose decode node has room for a long prompt and little more."""
    flags: dict[str, object] = {"max_num_batched_tokens": 24, "max_model_len": 800, "max_queue_wait_s": 300}
    decode: dict[str, object] = {"kv_cache_memory": 64 * SMALL.block_bytes}
    directory = tmp_path_factory.mktemp("narrow")
    with cluster(directory, model=small_model, only={"decode": decode}, **flags) as running:
        yield running


def test_chunked_prefill(narrow: Cluster, baseline: Texts) -> None:
    assert texts(narrow) == baseline
    narrow.assert_idle()


def test_preempted_and_resumed(narrow: Cluster, baseline: Texts) -> None:
    order = [3, 2, 1, 0] * 2  # the long one grows while the others do

    def run(i: int) -> str:
        return str(narrow.complete(PROMPTS[i], 190, ignore_eos=True)["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, order))
    for i, text in zip(order, answers, strict=True):
        assert text.startswith(baseline["greedy"][i])
    assert narrow.decodes[0].get("/v1/status")["counters"]["preemptions"] > 0
    narrow.assert_idle()
