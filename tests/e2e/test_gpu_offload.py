"""Engines of two ranks that keep half of their weights in the host's memory: the text of those that keep none there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, Cluster
from tests.e2e.prompts import raw_prompts

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)
pytest.importorskip("flashinfer")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

SIZE = tiny_model.Size(512, 6, 8, 2, 64, 1024, 1024)  # heads for which FlashInfer's kernels need no compiler
PROMPTS = [*raw_prompts()[:3], list(range(5, 400))]
TOKENS = 24
MODES = ("off", "prefetch", "uva")


def texts(running: Cluster) -> list[str]:
    def one(prompt: object) -> str:
        return str(running.complete(prompt, TOKENS, ignore_eos=True)["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def start(folder: Path, model: Path, mode: str) -> Cluster:
    folder.mkdir()
    flags: dict[str, object] = {"tp": 2, "device": "cuda", "enable_sleep_mode": True, "weight_offload": mode}
    if mode != "off":
        flags["weight_offload_size"] = "50%"
    return Cluster(folder, prefill=0, decode=0, both=1, model=model, **flags)


def test_ranks_with_weights_in_the_hosts_memory(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "model", SIZE)
    with ExitStack() as stack:
        made = {mode: start(tmp_path / mode, model, mode) for mode in MODES}
        for running in made.values():
            stack.callback(running.stop)
        try:
            expected = texts(made["off"].wait_ready())
            for mode in MODES[1:]:
                running = made[mode].wait_ready()
                assert texts(running) == expected
                node = running.boths[0]
                for level in (1, 2):
                    assert HTTP.post(f"{node.url}/sleep?level={level}", timeout=60).json()["is_sleeping"]
                    assert not HTTP.post(f"{node.url}/wake_up", timeout=60).json()["is_sleeping"]
                    running.router.wait_ready()
                    assert texts(running) == expected
                running.assert_idle()
                said = node.log.read_text()
                assert "in the host's memory (50% asked for: 3 of 6 layers)" in said
        finally:
            for log in sorted(tmp_path.glob("*/*.log")):
                print(f"--- {log.parent.name} {log.name}\n{log.read_text()[-2500:]}")
