"""As test_parity.py, with sliding windows: on another worker than SmolLM2's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, cluster
from tests.e2e.prompts import raw_prompts
from tests.e2e.test_parity import OUTPUT_TOKENS, check, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, gemma3: Path) -> Iterator[Cluster]:
    flags: dict[str, object] = {"max_model_len": 2048, "kv_cache_memory": "384MiB", "max_queue_wait_s": 300}
    with cluster(tmp_path_factory.mktemp("gemma"), model=gemma3, **flags) as running:
        yield running


def test_gemma3_raw(gemma: Cluster, gemma3: Path) -> None:
    prompts = [*raw_prompts()[::2], raw_prompts()[-1]]
    bodies: list[dict[str, object]] = [{"prompt": p, "max_tokens": OUTPUT_TOKENS} for p in prompts]
    answers = serve(gemma, "/v1/completions", bodies)
    check(gemma3, answers)
    config = json.loads((gemma3 / "config.json").read_text())
    longest = max(a["usage"]["prompt_tokens"] for a in answers)  # type: ignore[index]
    assert longest > config["sliding_window"], "no prompt reached beyond the window"
    gemma.assert_idle()
