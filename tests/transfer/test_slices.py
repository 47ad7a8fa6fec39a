"""Slices against a model that copies arrays by index."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from pd_serve.errors import HandshakeError
from pd_serve.kv.layout import KVLayout, LayerGroup
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, Region
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.slices import Slicing, slicings

HEADS, DIM = 4, 2
LAYERS = ((0, 1, 4), (2, 3), (5,))
WINDOWS = (None, 16, 40)


def layout(block_size: int, tp: int = 1, rank: int = 0, dtype: str = "float16", **other: Any) -> KVLayout:
    heads = HEADS // tp
    groups = tuple(
        LayerGroup(layers, heads, DIM, window, rank * heads, HEADS)
        for layers, window in zip(LAYERS, WINDOWS, strict=True)
    )
    return KVLayout(block_size, dtype, groups)


def pool(kv: KVLayout, group: int, num_blocks: int, seed: int) -> np.ndarray:
    """[block][layer][K|V][head][token][dim] as 16-bit numbers."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 2**16, (num_blocks, *kv.block_shape(group)), dtype=np.uint16)


def addresses(rows: Rows) -> np.ndarray:
    """[n, R] byte offsets from address 0."""
    return rows.base + rows.starts[:, None] + rows.rows[None, :]


def copy(slicing: Slicing, source: np.ndarray, reader: np.ndarray, remote: np.ndarray, local: np.ndarray) -> None:
    """What a transport does, byte by byte."""
    src, dst = source.reshape(-1).view(np.uint8), reader.reshape(-1).view(np.uint8)
    run = np.arange(slicing.row_bytes)
    region = Region(0, 1, 1)
    take = addresses(slicing.source_rows(region, remote))[..., None] + run
    put = addresses(slicing.reader_rows(region, local))[..., None] + run
    dst[put] = src[take]


@pytest.mark.parametrize(("tp_source", "tp_reader"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16), (16, 64), (64, 16), (32, 64), (64, 32)])
def test_every_shared_head_and_token_is_copied_and_nothing_else(
    tp_source: int, tp_reader: int, sizes: tuple[int, int]
) -> None:
    source_block, reader_block = sizes
    for rank_s in range(tp_source):
        for rank_r in range(tp_reader):
            a, b = layout(source_block, tp_source, rank_s), layout(reader_block, tp_reader, rank_r)
            heads_s = set(range(rank_s * HEADS // tp_source, (rank_s + 1) * HEADS // tp_source))
            heads_r = set(range(rank_r * HEADS // tp_reader, (rank_r + 1) * HEADS // tp_reader))
            shared = sorted(heads_s & heads_r)
            if not shared:
                with pytest.raises(HandshakeError, match="no KV head is on both"):
                    slicings(a, b)
                continue
            found = slicings(a, b)
            assert len(found) == len(LAYERS) + 1
            for group in range(len(LAYERS)):
                one_group(a, b, group, found[group], shared)


def one_group(a: KVLayout, b: KVLayout, group: int, slicing: Slicing, shared: list[int]) -> None:
    tokens = min(a.block_size, b.block_size)
    source, reader = pool(a, group, 3 * 64 // a.block_size, 1), pool(b, group, 3 * 64 // b.block_size, 2)
    per_source, per_reader = a.block_size // tokens, b.block_size // tokens
    rng = np.random.default_rng(3)
    count = min(len(source) * per_source, len(reader) * per_reader) - 1
    remote = rng.permutation(len(source) * per_source)[:count].astype(np.int64)
    local = rng.permutation(len(reader) * per_reader)[:count].astype(np.int64)
    expected = reader.copy()
    hs = np.array(shared) - a.groups[group].first_head
    hr = np.array(shared) - b.groups[group].first_head
    for theirs, ours in zip(remote, local, strict=True):
        s0, r0 = theirs % per_source * tokens, ours % per_reader * tokens
        piece = source[theirs // per_source][:, :, hs, s0 : s0 + tokens]
        expected[ours // per_reader][:, :, hr, r0 : r0 + tokens] = piece
    copy(slicing, source, reader, remote, local)
    assert np.array_equal(reader, expected)
    layers = len(LAYERS[group])
    assert slicing.piece_bytes == 2 * layers * len(shared) * tokens * DIM * 2
    assert slicing.source.block_bytes == a.block_bytes(group)
    assert slicing.reader.block_bytes == b.block_bytes(group)
    same_heads = a.groups[group].num_kv_heads == b.groups[group].num_kv_heads
    assert slicing.whole is (same_heads and a.block_size == b.block_size)
    if a.block_size == b.block_size and not same_heads:
        assert slicing.row_bytes == len(shared) * tokens * DIM * 2  # heads of one K or V are one run


def test_replicated_heads_overlap() -> None:
    """More ranks than heads: two decode ranks hold the same head."""
    a = KVLayout(16, "float16", (LayerGroup((0,), 2, DIM),))
    for rank in range(4):
        b = KVLayout(16, "float16", (LayerGroup((0,), 1, DIM, None, rank // 2, 2),))
        found = slicings(a, b)[0]
        assert found.source.rows.tolist() == [rank // 2 * found.row_bytes, (2 + rank // 2) * found.row_bytes]


def test_the_probe_region_comes_last() -> None:
    probe = slicings(layout(16), layout(64))[-1]
    assert probe.whole
    assert probe.row_bytes == PROBE_BLOCK_BYTES
    pieces = np.arange(PROBE_BLOCKS, dtype=np.int64)
    assert np.array_equal(probe.source.starts(pieces), pieces * PROBE_BLOCK_BYTES)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (layout(16, dtype="float32"), ("float16", "float32", "--dtype")),
        (layout(24), ("16", "24", "--block-size")),
        (layout(0), ("16", "0", "--block-size")),
        (layout(-16), ("-16", "--block-size")),
        (layout(1 << 40), ("--block-size",)),
        (KVLayout(16, "float16", layout(16).groups[:2]), ("3", "2", "same model")),
        (KVLayout(16, "float16", (LayerGroup((0, 1), 4, DIM), *layout(16).groups[1:])), ("(0, 1, 4)", "(0, 1)")),
        (KVLayout(16, "float16", (LayerGroup((0, 1, 4), 4, 8), *layout(16).groups[1:])), ("2", "8", "head sizes")),
        (KVLayout(16, "float16", (LayerGroup((0, 1, 4), 4, DIM, 9), *layout(16).groups[1:])), ("None", "9", "windows")),
        (KVLayout(16, "float16", (LayerGroup((0, 1, 4), 2, DIM), *layout(16).groups[1:])), ("4", "2", "KV heads")),
        (
            KVLayout(16, "float16", (LayerGroup((0, 1, 4), 4, DIM, None, 2, 4), *layout(16).groups[1:])),
            ("2..5", "of 4"),
        ),
        (KVLayout(16, "float16", (LayerGroup((0, 1, 4), 4, DIM, None, -1, 4), *layout(16).groups[1:])), ("-1..2",)),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_both_values(other: KVLayout, words: tuple[str, ...]) -> None:
    for a, b in ((layout(16), other), (other, layout(16))):
        with pytest.raises(HandshakeError) as caught:
            slicings(a, b)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_layout_travels_as_data() -> None:
    kv = layout(32, 2, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(kv), type=KVLayout) == kv
    assert "heads=2+2/4" in kv.describe()
    assert kv.fingerprint() != layout(32, 2, 0).fingerprint()
    assert (
        layout(16, 1).fingerprint()
        == KVLayout(
            16, "float16", tuple(LayerGroup(g.layers, 4, DIM, g.window) for g in layout(16).groups)
        ).fingerprint()
    )
