"""Prefill and decode nodes on one GPU: the CPU nodes' texts in float32, one text however it was computed, and sleep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, Cluster, cluster
from tests.e2e.prompts import raw_prompts

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("flashinfer")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

PROMPTS = [raw_prompts()[i] for i in (0, 3, 13, 17, 20)]
KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234},
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.3, "logit_bias": {"40": 3.0}, "min_tokens": 5},
    "structured": {"structured_outputs": {"regex": "([a-z]{3,8} ){3,6}[0-9]{4}"}, "temperature": 0.8, "seed": 7},
    "allowed": {"allowed_token_ids": [*range(40, 90)], "bad_words": ["A"]},
}
TOKENS = 40
SIZE = tiny_model.Size(512, 4, 8, 2, 64, 1024, 4096)  # heads for which FlashInfer's kernels need no compiler
BLOCK_BYTES = SIZE.block_bytes

# Nats, of bfloat16: chunks and matrices that are summed up in another order move this model's log-probabilities by up
# to 0.15, where a token's lead is often a step of its logit (0.03). A block that is missing moves one by 0.7 and more.
ROUNDED = 0.35

Texts = dict[str, list[str]]
Logprobs = dict[str, Any]


def texts(running: Cluster) -> Texts:
    def run(job: tuple[str, int]) -> str:
        kind, i = job
        body = {"ignore_eos": kind not in ("penalties", "structured"), **KINDS[kind]}
        return str(running.complete(PROMPTS[i], TOKENS, **body)["choices"][0]["text"])

    jobs = [(kind, i) for kind in KINDS for i in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(run, jobs))
    return {kind: [text for (k, _), text in zip(jobs, answers, strict=True) if k == kind] for kind in KINDS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model"), SIZE)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Texts:
    with cluster(tmp_path_factory.mktemp("cpu"), model=model, threads=4) as running:
        return texts(running)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    flags: dict[str, object] = {"device": "cuda", "enable_sleep_mode": True, "local_prefill_tokens": 16}
    with cluster(tmp_path_factory.mktemp("float32"), model=model, **flags) as running:
        yield running


def test_the_cpu_nodes_texts(exact: Cluster, on_cpu: Texts) -> None:
    found = texts(exact)
    assert found == on_cpu
    assert texts(exact) == found  # from the prefix cache
    exact.assert_idle()


def test_logprobs_of_prompt_and_output(exact: Cluster) -> None:
    choice = exact.complete(PROMPTS[0], 4, logprobs=3, echo=True)["choices"][0]["logprobs"]
    assert choice["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["token_logprobs"][1:])
    assert all(len(top) >= 3 for top in choice["top_logprobs"][1:])


def test_nodes_sleep_and_wake(exact: Cluster, on_cpu: Texts) -> None:
    for level in (1, 2):
        for node in exact.nodes:
            assert HTTP.post(f"{node.url}/sleep?level={level}", timeout=60).json()["is_sleeping"]
        for node in exact.nodes:
            assert not HTTP.post(f"{node.url}/wake_up", timeout=60).json()["is_sleeping"]
        exact.router.wait_ready()
        assert texts(exact) == on_cpu
    exact.assert_idle()


def test_preempted_and_resumed(tmp_path: Path, model: Path, on_cpu: Texts) -> None:
    flags: dict[str, object] = {"max_num_batched_tokens": 24, "max_model_len": 1300, "block_size": 16}
    memory = 84 * BLOCK_BYTES
    with cluster(tmp_path, model=model, device="cuda", kv_cache_memory=memory, **flags) as narrow:

        def run(i: int) -> str:
            return str(narrow.complete(PROMPTS[i], 160, ignore_eos=True)["choices"][0]["text"])

        order = [0, 1, 2, 3] * 2
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(run, order))
        for i, text in zip(order, answers, strict=True):
            assert text.startswith(on_cpu["greedy"][i])
        assert narrow.decodes[0].get("/v1/status")["counters"]["preemptions"] > 0
        narrow.assert_idle()


def answers(running: Cluster) -> list[Logprobs]:
    """One after the other: of each the tokens, and the most likely ones at each of them."""
    return [running.complete(p, TOKENS, ignore_eos=True, logprobs=5)["choices"][0]["logprobs"] for p in PROMPTS]


def furthest(found: list[Logprobs], expected: list[Logprobs]) -> float:
    """How far log-probabilities are apart up to the first token that differs, this and its rival included, in nats."""
    most = 0.0
    for a, b in zip(found, expected, strict=True):
        for own, other, tops, others in zip(
            a["tokens"], b["tokens"], a["top_logprobs"], b["top_logprobs"], strict=True
        ):
            for token in (own, other):
                most = max(most, abs(tops.get(token, -math.inf) - others.get(token, math.inf)))
            if own != other:
                break  # what follows goes on from other texts
    return most


def test_bfloat16(tmp_path: Path, model: Path) -> None:
    """In graphs, by FlashInfer's kernels, over a real transfer: the same bits when it is computed in the same way, and
    but for rounding when it is not, be it on two nodes or on one, all at once or over a cached prefix.
    """
    with cluster(tmp_path, model=model, device="cuda", dtype="bfloat16") as pair:
        first, cached = answers(pair), answers(pair)
        assert answers(pair) == cached
        with pair.another_router([], pair.decodes) as alone:
            single = answers(alone)
            assert answers(alone) == single
        differences = {"cached": furthest(cached, first), "alone": furthest(single, first)}
        print("RESULT bfloat16, nats", differences)
        assert max(differences.values()) < ROUNDED
        assert min(node.get("/v1/status")["counters"]["prefix_hit_tokens"] for node in pair.nodes) > 0
        print("RESULT transport", [node.get("/v1/status")["engine"]["transport"] for node in pair.nodes])
        pair.assert_idle()
