"""A checkpoint in FP8 over a prefill and a decode node, K and V in FP8 or not: texts, and pairs that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.e2e import reference, tiny_model
from tests.e2e.cluster import Cluster, cluster, wait_for
from tests.e2e.prompts import raw_prompts
from tests.models.fp8_files import quantise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPTS = [raw_prompts()[i] for i in (0, 3, 13, 17, 20)]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fp8``: with scales of K and V; ``plain``: what its weights stand for."""
    made = tmp_path_factory.mktemp("model")
    tiny_model.write(made / "source", replace(tiny_model.TINY, length=4096))
    quantise(made / "source", "compressed-tensor-dynamic", made / "fp8", made / "plain", kv_scales=(0.05, 0.02))
    return made


Answers = list[tuple[list[int], list[int]]]


def answers(running: Cluster) -> Answers:
    """Tokens of each prompt, and of its greedy answer."""

    def one(prompt: str) -> tuple[list[int], list[int]]:
        answer = running.complete(prompt, TOKENS, ignore_eos=True, return_token_ids=True)
        (choice,) = answer["choices"]
        return choice.get("prompt_token_ids") or answer["prompt_token_ids"], choice["token_ids"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def layouts(running: Cluster) -> list[str]:
    return [node.get("/v1/status")["engine"]["layout"] for node in running.nodes]


def pulled(running: Cluster) -> dict[str, float] | None:
    """The decode node's counters, when it has pulled a prompt from another node."""
    counters: dict[str, float] = running.decodes[0].get("/v1/status")["counters"]
    return counters if counters["pulls"] else None


def need(device: str) -> None:
    if device == "cuda":
        pytest.importorskip("flashinfer")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Cluster]:
    """The checkpoint asks for K and V in FP8; activations are float32."""
    need(request.param)
    flags: dict[str, object] = {"device": request.param, "max_num_batched_tokens": 256}
    with cluster(tmp_path_factory.mktemp("pair"), model=folder / "fp8", **flags) as running:
        yield running


def test_two_nodes_and_one_say_the_same(pair: Cluster) -> None:
    assert all("dtype=float8_e4m3fn" in layout for layout in layouts(pair))
    found = answers(pair)
    assert max(len(prompt) for prompt, _ in found) > 256  # in chunks
    assert answers(pair) == found  # over cached prefixes
    in_form = pair.complete(PROMPTS[0], TOKENS, structured_outputs={"regex": "[a-z]{3,6} [0-9]{3}"}, seed=3)
    assert re.fullmatch("[a-z]{3,6} [0-9]{3}", in_form["choices"][0]["text"])
    pair.assert_idle()
    counters = wait_for(lambda: pulled(pair), 10, "pulls are counted")
    assert counters["checksum_bytes"] == counters["pull_bytes"] > 0
    with pair.another_router([], pair.decodes) as alone:
        assert answers(alone) == found
    pair.assert_idle()


def test_another_cache_dtype_is_refused_with_both_names(tmp_path: Path, folder: Path) -> None:
    """Of two prefill nodes the decode node works with the one that is like it: in float32, here."""
    with cluster(tmp_path, model=folder / "fp8", kv_cache_dtype="float32") as running:
        running.prefills.append(running.start_node("prefill", kv_cache_dtype="fp8"))
        (misfit,) = wait_for(lambda: misfits(running), 60, "the misfit is in the router's status")
        assert "dtype=float8_e4m3fn" in misfit and "but block-major" in misfit and "dtype=float32" in misfit
        assert "--kv-cache-dtype" in misfit
        for prompt, output in answers(running):
            assert reference.first_difference(folder / "plain", prompt, output) is None
        running.assert_idle()
        wait_for(lambda: pulled(running), 10, "pulls are counted")


def misfits(running: Cluster) -> list[str]:
    return [str(node) for node in running.router.get("/v1/status")["nodes"] if node["state"] == "misfit"]
