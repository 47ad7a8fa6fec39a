"""A mixture of experts over a prefill and a decode node: its float32 greedy text is transformers', token for token."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.e2e import reference, tiny_model
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.prompts import raw_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model"), tiny_model.SPARSE)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    if request.param == "cuda":
        pytest.importorskip("flashinfer")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    flags: dict[str, object] = {"device": request.param, "max_num_batched_tokens": 512}
    with cluster(tmp_path_factory.mktemp("pair"), model=model, **flags) as running:
        yield running


def served(running: Cluster, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompts and of their greedy answers, all asked at once."""

    def one(prompt: str) -> tuple[list[int], list[int]]:
        answer = running.complete(prompt, TOKENS, ignore_eos=True, return_token_ids=True)
        (choice,) = answer["choices"]
        return choice.get("prompt_token_ids") or answer["prompt_token_ids"], choice["token_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def test_transformers_text(pair: Cluster, model: Path) -> None:
    found = served(pair, raw_prompts())
    for prompt, output in found:
        assert len(output) == TOKENS
        assert reference.first_difference(model, prompt, output) is None
    assert max(len(prompt) for prompt, _ in found) > 512  # in chunks
    assert pair.decodes[0].get("/v1/status")["counters"]["pulls"] >= len(found)
    assert served(pair, raw_prompts()) == found  # over cached prefixes
    pair.assert_idle()


def test_one_node_alone(pair: Cluster) -> None:
    prompts = raw_prompts()[::5]
    with pair.another_router([], pair.decodes) as alone:
        assert served(alone, prompts) == served(pair, prompts)
    pair.assert_idle()
