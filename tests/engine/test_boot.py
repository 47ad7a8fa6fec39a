"""What an engine decides before it loads a model."""

from __future__ import annotations

import pytest

from pd_serve.config import NodeConfig
from pd_serve.engine.boot import _max_model_len
from pd_serve.errors import ConfigError
from pd_serve.models.config import ModelConfig
from tests.models.reference import LONGROPE, SIZES


def limit(asked: int, capacity: int, **more: object) -> int:
    model = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **SIZES, **more})
    config = NodeConfig(role="decode", max_model_len=asked)
    return _max_model_len(config, model, capacity)


def test_a_length_that_cannot_be_had_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"257 .*the model takes, 256 tokens.*--max-model-len"):
        limit(257, 10_000)
    with pytest.raises(ConfigError, match=r"200 does not fit.*100 tokens.*--kv-cache-memory"):
        limit(200, 100)
    assert (limit(256, 10_000), limit(100, 100), limit(0, 10_000), limit(0, 100)) == (256, 100, 256, 100)
    assert limit(1000, 1000, rope_scaling={"type": "linear", "factor": 4.0}) == 1000


def test_longrope_serves_its_original_context_unless_more_is_asked_for() -> None:
    assert (limit(0, 10_000, rope_scaling=LONGROPE), limit(256, 10_000, rope_scaling=LONGROPE)) == (64, 256)
