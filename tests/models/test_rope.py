"""Rotary tables beside transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pd_serve.models.rope import cos_sin_table, inverse_frequencies
from pd_serve.models.rope_config import parse_rope
from tests.models.reference import LLAMA3, LONGROPE, SIZES, YARN


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2},
        {**YARN, "attention_factor": 1.25},
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    ],
)
def test_tables_agree_with_transformers(parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {**SIZES, "max_position_embeddings": 65_536}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**sizes, head_dim=64, rope_parameters=dict(parameters)))
    positions = torch.tensor([[0, 1, 2, 77, 1000, 8191]])
    cos, sin = rotary(torch.zeros(1), positions)
    table = cos_sin_table(parse_rope(parameters, 0.0, 64, 65_536), 8192)[positions[0]]
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], atol=2e-4, rtol=0)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("parameters", "length", "served"),
    [
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, 4 * 256, 4 * 256),
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0}, 100, 256),
        (LONGROPE, 64, 64),
        (LONGROPE, 256, 256),
        ({**LONGROPE, "factor": 8.0}, 256, 256),
        ({**LONGROPE, "attention_factor": 1.25}, 256, 200),
    ],
)
def test_kinds_that_follow_the_length_agree_with_transformers_at_that_length(
    parameters: dict[str, Any], length: int, served: int
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES, head_dim=16, rope_parameters=dict(parameters)))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    rope = parse_rope(parameters, 0.0, 16, SIZES["max_position_embeddings"]).for_length(served)
    table = cos_sin_table(rope, length)
    torch.testing.assert_close(table[:, :8], cos[0, :, :8], atol=2e-4, rtol=0)
    torch.testing.assert_close(table[:, 8:], sin[0, :, :8], atol=2e-4, rtol=0)


def test_frequencies_are_exact_where_nothing_is_scaled() -> None:
    frequencies, scale = inverse_frequencies(parse_rope({}, 10_000.0, 8, 64))
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert scale == 1.0
