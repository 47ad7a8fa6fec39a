"""pd-serve's transfer between servers of vLLM with two ranks each: every rank reads the heads of its counterpart."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from tests.models.reference import make_tiny
from tests.peers.handing import HELD, pair_of, prefilled, prompts, soon, three_ways
from tests.peers.servers import NAME

pytestmark = pytest.mark.peer


@pytest.fixture
def model(tmp_path: Path, smollm2: Path) -> Path:
    """Of four heads and two of KV: SmolLM2's nine cannot be halved."""
    folder = tmp_path / "model"
    make_tiny("qwen3", folder, {"vocab_size": 49152, "max_position_embeddings": 2048})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / file, folder)
    return folder


def test_two_ranks_on_either_side(model: Path, tmp_path: Path) -> None:
    # workers of several ranks spin: on two cores a step takes seconds
    settings = {"lease_s": 60, "pull_timeout_s": 60}
    with pair_of(model, tmp_path, ("--tensor-parallel-size", "2"), settings) as (p, d):
        for prompt in prompts(1)[3::5]:
            whole, plain, second = three_ways(p, d, prompt)
            assert plain == second == whole
        soon(lambda: p.metric(HELD) == 0, 60)
        assert d.metric("vllm:external_prefix_cache_hits_total") > 1000
        assert "was not fetched" not in d.log.read_text(errors="replace")
        _, params = prefilled(p, prompts(2)[-2])
        body = {"model": NAME, "prompt": prompts(2)[-2], "max_tokens": 500, "kv_transfer_params": params}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{d.url}/v1/completions", json=body, timeout=0.3, trust_env=False)
        soon(lambda: p.metric(HELD) == 0 == d.metric(HELD), 100)
