"""Ranks that have a part of a model each compute the whole: here they are threads, which meet for every sum."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pd_serve.compute.cpu import ops
from pd_serve.errors import ConfigError
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.models.interface import Experts, Linear
from tests.e2e import tiny_model
from tests.models import reference
from tests.models.fp8_files import quantise

TOKENS = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1))
SPARSE = tiny_model.Size(128, 2, 4, 2, 16, 48, 256, experts=8)


class Meeting:
    """Of some threads: each brings a tensor and leaves with all of them."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._brought: list[Tensor] = [torch.empty(0)] * ranks

    def all_of(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._brought[rank] = tensor
        self._barrier.wait()
        found = [each.clone() for each in self._brought]
        self._barrier.wait()
        return found


class ThreadRanks:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def summed(self, linear: Linear) -> Linear:
        return _Met(linear, lambda y: torch.stack(self._meeting.all_of(self._rank, y)).sum(0))

    def summed_experts(self, experts: Experts) -> Experts:
        return _Met(experts, lambda y: torch.stack(self._meeting.all_of(self._rank, y)).sum(0))

    def gathered(self, linear: Linear) -> Linear:
        return _Met(linear, lambda y: torch.cat(self._meeting.all_of(self._rank, y), -1))


class _Met:
    def __init__(self, layer: object, meet: object) -> None:
        self._layer, self._meet = layer, meet

    @property
    def tensors(self) -> list[Tensor]:
        return self._layer.tensors  # type: ignore[attr-defined, no-any-return]

    def __call__(self, *x: Tensor) -> Tensor:
        return self._meet(self._layer(*x))  # type: ignore[operator, no-any-return]


def logits(directory: Path, ranks: int, load_format: str = "safetensors") -> list[Tensor]:
    """Of each rank."""
    meeting = Meeting(ranks)

    def one(rank: int) -> Tensor:
        config = ModelConfig.from_directory(directory, "").for_rank(rank, ranks)
        decoder = load_decoder(
            directory, config, "float32", load_format, ops=ops, ranks=ThreadRanks(meeting, rank) if ranks > 1 else None
        )
        return reference.logits(decoder, TOKENS)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def same_as_whole(directory: Path, ranks: int = 2, load_format: str = "safetensors") -> None:
    (whole,) = logits(directory, 1, load_format)
    found = logits(directory, ranks, load_format)
    for each in found:
        assert torch.equal(each, found[0])  # so that all ranks sample the same
    torch.testing.assert_close(found[0], whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "family",
    ["llama-biases", "llama-tied-eps", "mistral-sliding", "qwen2", "qwen3-biases", "qwen3-moe", "qwen3-moe-mlp-only",
     "gemma3-softcap"],
)  # fmt: skip
def test_two_ranks_compute_the_model(family: str, tmp_path: Path) -> None:
    reference.make_tiny(family, tmp_path)
    same_as_whole(tmp_path)


def test_experts_that_are_fused_in_the_file(tmp_path: Path) -> None:
    reference.make_tiny("qwen3-moe", tmp_path, save_original_format=False)
    same_as_whole(tmp_path)


def test_made_up_weights_are_parts_of_the_same(tmp_path: Path) -> None:
    reference.make_tiny("qwen2", tmp_path)
    same_as_whole(tmp_path, load_format="dummy")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_four_ranks(kv_heads: int, tmp_path: Path) -> None:
    same_as_whole(tiny_model.write(tmp_path, tiny_model.Size(64, 2, 8, kv_heads, 16, 96, 256)), 4)


@pytest.mark.parametrize("form", ["compressed-rows", "compressed-tensor"])
def test_scales_of_rows_go_with_them(form: str, tmp_path: Path) -> None:
    quantise(tiny_model.write(tmp_path / "source", SPARSE), form, tmp_path / "fp8", tmp_path / "plain")
    same_as_whole(tmp_path / "fp8")
    same_as_whole(tmp_path / "fp8", 4)  # there are two KV heads


def test_blocks_with_a_scale_are_not_cut_in_two(tmp_path: Path) -> None:
    for name, head_dim in (("whole", 128), ("cut", 64)):
        source = tiny_model.write(tmp_path / name, tiny_model.Size(256, 2, 4, 2, head_dim, 512, 256))
        quantise(source, "blocks", tmp_path / f"{name}-fp8", tmp_path / f"{name}-plain")
    same_as_whole(tmp_path / "whole-fp8")
    with pytest.raises(ConfigError, match=r"--tp 2 would cut FP8 blocks of 128 rows in two \(KV heads: 2\)"):
        logits(tmp_path / "cut-fp8", 2)


def test_what_does_not_divide_is_named(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(tiny_model.write(tmp_path), "")
    with pytest.raises(ConfigError, match="--tp 3 does not divide the model's KV heads, 2"):
        config.for_rank(0, 3)
    with pytest.raises(ConfigError, match="--tp 8 does not divide the model's attention heads, 4"):
        config.for_rank(0, 8)


def test_a_rank_has_its_share_of_the_cache(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(tiny_model.write(tmp_path), "")
    planes = [config.for_rank(rank, 2).layer_groups()[0].planes[0] for rank in range(2)]
    assert [(plane.first_head, plane.heads, plane.total_heads) for plane in planes] == [(0, 1, 2), (1, 1, 2)]
    planes = [config.for_rank(rank, 4).layer_groups()[0].planes[0] for rank in range(4)]
    assert [plane.first_head for plane in planes] == [0, 0, 1, 1]
    assert {(plane.heads, plane.total_heads) for plane in planes} == {(1, 2)}
