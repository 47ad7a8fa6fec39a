"""Where vLLM's blocks lie, by tensors of the shapes and strides that it registers."""

from __future__ import annotations

import pytest
import torch

from pd_serve.errors import ConfigError
from pd_serve.integrations.vllm.memory import CacheGroup, Found, find

BLOCKS = 5
LAYERS = ("a", "b", "c")
GROUP = CacheGroup(LAYERS, 16, None)


def found(caches: dict[str, torch.Tensor], *groups: CacheGroup) -> Found:
    return find(caches, groups or (GROUP,), BLOCKS, order="TEST tp=1", dtype="float32")


def by_layer(*shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name in LAYERS}


def block_major(heads_outside: bool = False) -> dict[str, torch.Tensor]:
    """One allocation, all layers of a block side by side: ``[block][layer][head][token][dim]``, or heads before
    layers."""
    whole = torch.zeros(BLOCKS, 2, 3, 16, 8) if heads_outside else torch.zeros(BLOCKS, 3, 2, 16, 8)
    return {name: whole[:, :, i] if heads_outside else whole[:, i] for i, name in enumerate(LAYERS)}


def test_a_layer_a_tensor() -> None:
    caches = by_layer(BLOCKS, 2, 16, 2, 8)
    (region,) = found(caches).regions
    assert [address for address, _ in region.ranges] == [cache.data_ptr() for cache in caches.values()]
    assert (region.block_bytes, region.num_blocks) == (2 * 16 * 2 * 8 * 4, BLOCKS)


def test_places_are_in_the_order_of_layers_wherever_they_lie() -> None:
    whole = torch.zeros(3, BLOCKS, 2, 16, 2, 8)
    up, down = ({name: whole[i] for i, name in enumerate(names)} for names in (LAYERS, LAYERS[::-1]))
    (ascending,), (descending,) = found(up).regions, found(down).regions
    assert descending.places == ascending.places[::-1]
    assert found({name: up[name] for name in LAYERS}).layout == found(down).layout, "such servers pair"


def test_k_apart_from_v() -> None:
    caches = by_layer(2, BLOCKS, 16, 2, 8)
    (region,) = found(caches).regions
    assert [address for address, _ in region.ranges] == [c[i].data_ptr() for c in caches.values() for i in range(2)]


@pytest.mark.parametrize("heads_outside", [False, True])
def test_blocks_of_all_layers_are_one_region(heads_outside: bool) -> None:
    caches = block_major(heads_outside)
    (region,) = found(caches).regions
    assert region.address == caches["a"].data_ptr()
    assert region.block_bytes == 3 * 2 * 16 * 8 * 4


def test_kernels_with_smaller_blocks() -> None:
    (region,) = found(by_layer(BLOCKS * 4, 2, 4, 2, 8)).regions
    assert (region.block_bytes, region.num_blocks, len(region.places)) == (4 * 2 * 4 * 2 * 8 * 4, BLOCKS, 3)


def test_groups_that_share_memory_have_regions_of_their_own() -> None:
    caches = block_major()
    caches |= {"d": caches["a"]}
    it = found(caches, GROUP, CacheGroup(("d",), 16, 64))
    assert it.groups == (0, 1)
    assert [group.window for group in it.layout.groups] == [None, 64]


def test_only_equal_orders_pair() -> None:
    kins = [
        found(caches).layout.kin()
        for caches in (
            by_layer(BLOCKS, 2, 16, 2, 8),
            by_layer(BLOCKS, 2, 2, 16, 8),  # heads before tokens: as many bytes
            block_major(),
            block_major(heads_outside=True),
        )
    ]
    assert len(set(kins)) == len(kins)
    assert found(by_layer(BLOCKS, 2, 16, 2, 8)).layout == found(by_layer(BLOCKS, 2, 16, 2, 8)).layout


@pytest.mark.parametrize("shape", [(3, 2, 16, 2, 8), (3, BLOCKS, 16, 2, 8), (BLOCKS * 16 + 1, 8)])
def test_what_is_no_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="none of 5 blocks"):
        found(by_layer(*shape))
