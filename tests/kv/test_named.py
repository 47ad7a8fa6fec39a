"""What routers are told of the cache: the same names whatever blocks are, and always what is there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.errors import PoolExhausted
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager, SequenceBlocks, Tokens
from pd_serve.router.prefixes import Prefixes
from pd_serve.wire.chunks import CHUNK_TOKENS, chain

FULL = kv_group((0,), num_kv_heads=1, head_dim=8)
WINDOW = kv_group((1,), num_kv_heads=1, head_dim=8, window=200)
NUMBERS = np.arange(5 * CHUNK_TOKENS, dtype=np.int32)


def manager(block_size: int, blocks: int, *, windowed: bool = False) -> KVManager:
    groups = (FULL, WINDOW) if windowed else (FULL,)
    layout = KVLayout(block_size, "float32", groups)
    return KVManager(layout, (blocks,) * len(groups), len(NUMBERS), fingerprint="model")


def compute(kv: KVManager, tokens: Tokens, step: int = 4096) -> SequenceBlocks:
    """In chunks of ``step`` tokens."""
    match = kv.match(tokens, len(tokens) - 1)
    blocks = kv.open(match)
    for end in range(match.num_tokens + step, len(tokens) + step, step):
        kv.extend(blocks, min(end, len(tokens)))
        kv.commit(blocks, tokens, min(end, len(tokens)))
    return blocks


@pytest.mark.parametrize("block_size", [16, 48, 128, 1024])
@pytest.mark.parametrize("step", [100, 4096])
@pytest.mark.parametrize("windowed", [False, True])
def test_names_do_not_depend_on_blocks_or_steps(block_size: int, step: int, windowed: bool) -> None:
    kv = manager(block_size, 400, windowed=windowed)
    tokens = NUMBERS[: 4 * CHUNK_TOKENS + 40]
    compute(kv, tokens, step)
    expected = chain("model", tokens.tobytes())
    full_blocks = len(tokens) // block_size * block_size
    assert kv.named.take() == (expected[: full_blocks // CHUNK_TOKENS], [])
    assert kv.named.take() == ([], [])
    other = np.concatenate((tokens[: 2 * CHUNK_TOKENS], tokens[:CHUNK_TOKENS]))
    compute(kv, other, step)
    if block_size <= CHUNK_TOKENS:
        assert kv.named.take() == (
            chain("model", other.tobytes())[2 : len(other) // block_size * block_size // CHUNK_TOKENS],
            [],
        )
    kv.check()


def test_what_is_evicted_is_told_and_a_reset_is_the_end_of_all() -> None:
    kv = manager(128, 13)  # three chunks
    kv.close(compute(kv, NUMBERS[: 3 * CHUNK_TOKENS]))
    names, _ = kv.named.take()
    kv.close(compute(kv, NUMBERS[CHUNK_TOKENS : 2 * CHUNK_TOKENS + 128]))
    stored, evicted = kv.named.take()
    assert stored == chain("model", NUMBERS[CHUNK_TOKENS : 2 * CHUNK_TOKENS].tobytes())
    assert evicted == names[:0:-1]
    kv.reset()
    assert kv.named.take() == ([], [names[0], *stored]) and not kv.named.held


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3), st.booleans()), max_size=25))
def test_a_router_that_hears_all_knows_what_is_there(events: list[tuple[int, int, int, bool]]) -> None:
    kv, prefixes = manager(128, 25), Prefixes()
    running: list[SequenceBlocks] = []
    for first, second, chunks, ends in events:
        tokens = np.repeat(np.array([first, second, first], dtype=np.int32), CHUNK_TOKENS)[: chunks * CHUNK_TOKENS]
        try:
            running.append(compute(kv, tokens))
        except PoolExhausted:
            ends = True
        while ends and running:
            kv.close(running.pop())
        stored, evicted = kv.named.take()
        prefixes.evicted("n", evicted)
        prefixes.stored("n", stored)
        kv.check()
        assert prefixes.names("n") == set(kv.named.held)
