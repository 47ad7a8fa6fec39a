"""Slow is not dead: a step longer than every time-out of liveness succeeds, and a stopped engine is left at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import HTTP, Cluster, cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TIMEOUT_S = 1.0
# Weights are made up: what counts is that 1,800 tokens take one core some seconds.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Cluster]:
    """A node whose steps take seconds, under time-outs of one second."""
    model = tmp_path_factory.mktemp("model") / "slow"
    model.mkdir()
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    with cluster(
        tmp_path_factory.mktemp("slow"),
        prefill=0,
        router={"engine_timeout_s": TIMEOUT_S, "node_wait_s": 30},
        model=model,
        load_format="dummy",
        dtype="float32",
        kv_cache_memory="128MiB",
        engine_timeout_s=TIMEOUT_S,
        max_num_batched_tokens=2048,
        lease_s=1,
        pull_timeout_s=1,
    ) as running:
        yield running


def test_a_step_longer_than_the_timeouts(slow: Cluster) -> None:
    node = slow.decodes[0]
    answer: list[dict[str, object]] = []
    asking = threading.Thread(target=lambda: answer.append(slow.complete(list(range(300, 2100)), 1)))
    started_s = time.monotonic()
    asking.start()
    running = wait_for(lambda: node.get("/v1/status")["engine"]["running"], 10, "a step")
    assert running["tokens"] == 1800
    while asking.is_alive():
        assert HTTP.get(node.url + "/health").status_code == 200
        time.sleep(0.2)
    assert time.monotonic() - started_s > 2 * TIMEOUT_S, "the model is too small to tell anything"
    assert answer and "choices" in answer[0]
    assert "lost" not in slow.router.log.read_text()


def test_a_stopped_engine_is_left_within_the_setting(slow: Cluster) -> None:
    node = slow.decodes[0]
    engine = node.get("/v1/status")["engine"]["pid"]
    os.kill(engine, signal.SIGSTOP)
    stopped_s = time.monotonic()
    try:
        wait_for(lambda: HTTP.get(node.url + "/health").status_code == 503, 10, "the node says so")
        wait_for(lambda: HTTP.get(slow.router.url + "/ready").status_code == 503, 10, "the router has left it")
        assert time.monotonic() - stopped_s < TIMEOUT_S + 1.0
    finally:
        os.kill(engine, signal.SIGCONT)
    slow.revive()  # it registers again
    assert slow.complete([300, 301, 302], 1)["choices"]
    slow.assert_idle()
