"""The runner's logits are those of transformers, whatever steps a prompt is computed in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.step import Step
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pool import HostPool
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from tests.models import reference

BLOCK_SIZE = 4
TOKENS = np.random.default_rng(0).integers(3, 320, 60)


def step(groups: int, begin: int, end: int, all_rows: bool = True) -> Step:
    """Tokens ``begin:end`` of one sequence in blocks 1, 2, 3 ..."""
    positions = np.arange(begin, end, dtype=np.int64)
    return Step(
        tokens=TOKENS[begin:end].astype(np.int64),
        positions=positions,
        query_start=np.array([0, end - begin], np.int32),
        seq_lens=np.array([end], np.int32),
        slots=[positions + BLOCK_SIZE] * groups,
        block_tables=[np.arange(1, -(-end // BLOCK_SIZE) + 1, dtype=np.int32)[None]] * groups,
        logits_rows=np.arange(end - begin) if all_rows else np.array([end - begin - 1]),
        num_decode=int(end - begin == 1 and begin > 0),
    )


def runner_of(directory: Path, dtype: str = "float32") -> tuple[Runner, int]:
    config = ModelConfig.from_directory(directory)
    layout = KVLayout(BLOCK_SIZE, dtype, config.layer_groups())
    pool = HostPool(layout, (20,) * len(layout.groups))
    return Runner(load_decoder(directory, config, dtype, ops=ops), config, layout, pool.tensors(), 1), len(
        layout.groups
    )


@pytest.mark.parametrize(
    "family", ["llama", "llama-head-dim-10", "qwen2-sliding", "gemma3", "qwen3", "qwen3-head-dim-12", "qwen3-moe"]
)
@pytest.mark.parametrize("borders", [(0, 60), (0, 7, 30, 31, 32, 60), (0, 58, 59, 60)])
def test_logits_agree_with_transformers(family: str, borders: tuple[int, ...], tmp_path: Path) -> None:
    model = reference.make_tiny(family, tmp_path)
    runner, groups = runner_of(tmp_path)
    runner.warm_up()  # must leave nothing behind
    found = torch.cat([runner.execute(step(groups, a, b)) for a, b in pairwise(borders)])
    torch.testing.assert_close(found, reference.reference_logits(model, torch.from_numpy(TOKENS)), atol=1e-4, rtol=1e-5)


def test_only_the_rows_asked_for(tmp_path: Path) -> None:
    reference.make_tiny("llama", tmp_path)
    runner, groups = runner_of(tmp_path)
    whole = runner.execute(step(groups, 0, 60))
    last = runner.execute(step(groups, 0, 60, all_rows=False))
    assert last.shape == (1, 320) and last.dtype == torch.float32
    torch.testing.assert_close(last, whole[-1:])


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reference.make_tiny("llama", tmp_path)
    exact, rounded = (
        torch.cat([runner.execute(step(groups, 0, 50)), runner.execute(step(groups, 50, 51))])
        for runner, groups in (runner_of(tmp_path, dtype) for dtype in ("float32", "bfloat16"))
    )
    assert (torch.nn.functional.cosine_similarity(exact, rounded, dim=-1) > 0.98).all()
