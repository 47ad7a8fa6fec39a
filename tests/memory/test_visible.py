"""Which GPU each node of one machine gets."""

from __future__ import annotations

import pytest

from pd_serve.errors import ConfigError
from pd_serve.memory.visible import deal_gpus


def dealt(nodes: int, gpus: int, visible: str | None = None, *, each: int = 1, may_share: bool = False) -> list[str]:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return deal_gpus(nodes, each, may_share=may_share, count=lambda: gpus, environ=environ)


def test_a_gpu_for_each() -> None:
    assert dealt(2, 8) == ["0", "1"]


def test_what_is_visible_is_dealt_by_its_names() -> None:
    assert dealt(3, 3, "5,2, 7") == ["5", "2", "7"]
    assert dealt(2, 2, "GPU-a1,MIG-b2,nonsense") == ["GPU-a1", "MIG-b2"]


def test_nodes_share_gpus_by_turns_if_their_size_is_given() -> None:
    assert dealt(5, 2, may_share=True) == ["0", "1", "0", "1", "0"]
    assert dealt(2, 1, "3", may_share=True) == ["3", "3"]


def test_nodes_that_would_take_each_others_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 nodes and 1 GPU: .*--both 1 .*--kv-cache-memory"):
        dealt(2, 1)


def test_nodes_of_several_ranks() -> None:
    assert dealt(2, 4, each=2) == ["0,1", "2,3"]
    assert dealt(2, 2, each=2, may_share=True) == ["0,1", "0,1"]
    with pytest.raises(ConfigError, match=r"--tp 4: a node wants 4 GPUs, and there are 2"):
        dealt(1, 2, each=4)
    with pytest.raises(ConfigError, match=r"2 nodes of 2 GPUs and 3 GPUs: .*--both 1 "):
        dealt(2, 3, each=2)
