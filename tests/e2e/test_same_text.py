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


def test_one_node_alone(tmp_path: Path, small_model: Path, baseline: Texts) -> None:
    with cluster(tmp_path, prefill=0, model=small_model) as alone:
        assert texts(alone) == baseline
        alone.assert_idle()


def test_chunked_prefill(tmp_path: Path, small_model: Path, baseline: Texts) -> None:
    # a block and a half
    with cluster(tmp_path, model=small_model, max_num_batched_tokens=24) as chunked:
        assert texts(chunked) == baseline
        chunked.assert_idle()


def test_preempted_and_resumed(tmp_path: Path, small_model: Path, baseline: Texts) -> None:
    memory = 84 * SMALL.block_bytes  # room for one long prompt and little more
    with cluster(tmp_path, model=small_model, kv_cache_memory=memory, max_model_len=1300) as small:

        def run(i: int) -> str:
            return str(small.complete(PROMPTS[i], 160, ignore_eos=True)["choices"][0]["text"])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(run, [0, 1, 2, 3, 0, 1, 2, 3]))
        for i, text in zip([0, 1, 2, 3, 0, 1, 2, 3], answers, strict=True):
            assert text.startswith(baseline["greedy"][i])
        assert small.decodes[0].get("/v1/status")["counters"]["preemptions"] > 0
        small.assert_idle()


def test_short_prompts_on_the_decode_node(tmp_path: Path, small_model: Path, baseline: Texts) -> None:
    with cluster(tmp_path, model=small_model, local_prefill_tokens=64) as running:
        assert texts(running) == baseline
        counters = running.prefills[0].get("/v1/status")["counters"]
        assert counters["requests"] < 2 * len(PROMPTS)
        running.assert_idle()
