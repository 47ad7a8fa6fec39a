"""Slices against a model that copies arrays by index."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from pd_serve.errors import HandshakeError
from pd_serve.kv.layout import DTYPE_BYTES, KVLayout, LayerGroup, Plane, kv_group
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, Region
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.slices import Slicing, counterparts, needed, slicings

HEADS, DIM = 4, 2
LAYERS = ((0, 1, 4), (2, 3), (5,))
WINDOWS = (None, 16, 40)


def layout(block_size: int, tp: int = 1, rank: int = 0, dtype: str = "float16", **other: Any) -> KVLayout:
    heads = HEADS // tp
    groups = tuple(
        kv_group(layers, heads, DIM, window, rank * heads, HEADS)
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
    hs = np.array(shared) - a.groups[group].planes[0].first_head
    hr = np.array(shared) - b.groups[group].planes[0].first_head
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
    same_heads = a.groups[group].planes[0].heads == b.groups[group].planes[0].heads
    assert slicing.whole is (same_heads and a.block_size == b.block_size)
    if a.block_size == b.block_size and not same_heads:
        assert slicing.row_bytes == len(shared) * tokens * DIM * 2  # heads of one K or V are one run


def test_replicated_heads_overlap() -> None:
    """More ranks than heads: two decode ranks hold the same head."""
    a = KVLayout(16, "float16", (kv_group((0,), 2, DIM),))
    for rank in range(4):
        b = KVLayout(16, "float16", (kv_group((0,), 1, DIM, None, rank // 2, 2),))
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
        (KVLayout(16, "float16", (kv_group((0, 1), 4, DIM), *layout(16).groups[1:])), ("(0, 1, 4)", "(0, 1)")),
        (KVLayout(16, "float16", (kv_group((0, 1, 4), 4, 8), *layout(16).groups[1:])), ("2", "8", "head sizes")),
        (KVLayout(16, "float16", (kv_group((0, 1, 4), 4, DIM, 9), *layout(16).groups[1:])), ("None", "9", "windows")),
        (KVLayout(16, "float16", (kv_group((0, 1, 4), 2, DIM), *layout(16).groups[1:])), ("4", "2", "KV heads")),
        (
            KVLayout(16, "float16", (kv_group((0, 1, 4), 4, DIM, None, 2, 4), *layout(16).groups[1:])),
            ("2..5", "of 4"),
        ),
        (KVLayout(16, "float16", (kv_group((0, 1, 4), 4, DIM, None, -1, 4), *layout(16).groups[1:])), ("-1..2",)),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_both_values(other: KVLayout, words: tuple[str, ...]) -> None:
    for a, b in ((layout(16), other), (other, layout(16))):
        with pytest.raises(HandshakeError) as caught:
            slicings(a, b)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("ours", "others"), [(1, 1), (1, 4), (4, 1), (2, 4), (4, 2), (3, 2), (8, 4)])
def test_counterparts_hold_what_a_rank_has_and_nobody_else_does(ours: int, others: int) -> None:
    def heads(rank: int, ranks: int) -> set[int]:
        return set(range(rank * 24 // ranks, (rank + 1) * 24 // ranks))

    for rank in range(ours):
        mine = heads(rank, ours)
        sharing = [other for other in range(others) if heads(other, others) & mine]
        assert list(counterparts(rank, ours, others)) == sharing
        assert all(rank in counterparts(other, others, ours) for other in sharing)  # both ends agree


def test_heads_are_read_from_the_first_rank_that_has_them() -> None:
    whole, groups = layout(16), len(LAYERS)
    assert needed([layout(16, 2, 0), layout(16, 2, 1)], whole) == [(True,) * groups] * 2
    assert needed([whole, whole], whole) == [(True,) * groups, (False,) * groups]  # as many replicas as ranks
    assert needed([layout(16, 2, 1), layout(16, 4, 2), layout(16, 2, 0)], whole)[1] == (False,) * groups
    assert needed([foreign(), foreign()], foreign()) == [(True,), (False,)]
    with pytest.raises(HandshakeError, match="KV heads 0, 1 of layer group 0 are on none"):
        needed([layout(16, 2, 1), layout(16, 4, 3)], whole)


# --- planes that are not K and V of one shape


def of_planes(block_size: int, *planes: Plane, dtype: str = "float16", layers: int = 3) -> KVLayout:
    return KVLayout(block_size, dtype, (LayerGroup(tuple(range(layers)), planes),))


def bytes_by_name(kv: KVLayout, num_blocks: int) -> tuple[np.ndarray, dict[tuple[int, ...], np.ndarray]]:
    """A pool, and views ``[block, token, byte]`` of it by (layer, plane, head of the model); order as documented."""
    memory = np.random.default_rng(kv.block_size).integers(0, 256, num_blocks * kv.block_bytes(0), dtype=np.uint8)
    blocks, at, views = memory.reshape(num_blocks, -1), 0, {}
    for layer in kv.groups[0].layers:
        for number, plane in enumerate(kv.groups[0].planes):
            for head in range(plane.first_head, plane.end_head):
                size = plane.dim * DTYPE_BYTES[plane.dtype or kv.dtype]
                end = at + size * kv.block_size
                views[layer, number, head] = blocks[:, at:end].reshape(num_blocks, kv.block_size, size)
                at = end
    assert at == kv.block_bytes(0)
    return memory, views


def check_copy(a: KVLayout, b: KVLayout) -> Slicing:
    """Copies all blocks of ``a`` to ``b`` and compares: what both have is the same, all else is untouched."""
    slicing = slicings(a, b)[0]
    longest = max(a.block_size, b.block_size)
    source, theirs = bytes_by_name(a, 2 * longest // a.block_size)
    reader, ours = bytes_by_name(b, 2 * longest // b.block_size)
    before = {name: view.copy() for name, view in ours.items()}
    pieces = np.arange(2 * longest // min(a.block_size, b.block_size), dtype=np.int64)
    copy(slicing, source, reader, pieces, pieces)
    for name, view in ours.items():
        size = view.shape[-1]
        want = theirs[name].reshape(-1, size) if name in theirs else before[name].reshape(-1, size)
        assert np.array_equal(view.reshape(-1, size), want), name
    return slicing


def planes_of(rank: int, ranks: int) -> tuple[Plane, ...]:
    """K and V of different sizes, with a scale each, of 8 heads."""
    share = 8 // ranks
    return tuple(
        Plane(share, dim, rank * share, 8, dtype) for dim, dtype in ((24, ""), (16, ""), (1, "float32"), (1, "float32"))
    )


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("sources", [1, 2, 4])
def test_planes_of_different_sizes(sources: int, readers: int) -> None:
    for i in range(sources):
        for k in range(readers):
            a = of_planes(16, *planes_of(i, sources), dtype="float8_e4m3fn")
            b = of_planes(16, *planes_of(k, readers), dtype="float8_e4m3fn")
            if i * readers < (k + 1) * sources and k * sources < (i + 1) * readers:
                assert check_copy(a, b).whole is (sources == readers)
            else:
                with pytest.raises(HandshakeError, match="no KV head is on both"):
                    slicings(a, b)


def test_planes_of_different_sizes_want_the_same_block_size() -> None:
    a, b = (of_planes(size, *planes_of(0, 1), dtype="float8_e4m3fn") for size in (16, 32))
    with pytest.raises(HandshakeError, match=r"16 tokens.*32 at.*24 and 16 and 4 and 4 bytes.*--block-size"):
        slicings(a, b)
    assert a.kin() != b.kin()  # routers do not pair them


@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (64, 16), (16, 64)])
def test_a_latent_is_whole_on_every_rank(sizes: tuple[int, int]) -> None:
    """MLA: one plane, whose one head no rank splits."""
    a, b = (of_planes(size, Plane(1, 576)) for size in sizes)
    slicing = check_copy(a, b)
    assert slicing.whole is (sizes[0] == sizes[1])
    assert a.block_shape(0) == (3, 1, 1, sizes[0], 576)
    assert a.kin() == b.kin()


def test_planes_of_different_shapes_have_no_common_shape() -> None:
    with pytest.raises(ValueError, match="2 shapes"):
        of_planes(16, Plane(1, 8), Plane(1, 4)).block_shape(0)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (of_planes(16, Plane(1, 8)), "numbers of planes differ: 2.*1"),
        (of_planes(16, Plane(1, 8), Plane(1, 4)), "head sizes differ: 8.*4"),
        (of_planes(16, Plane(1, 8), Plane(1, 8, dtype="float32")), "data types of a plane differ"),
        (of_planes(16), "numbers of planes differ: 2.*0"),
    ],
)
def test_planes_that_differ_are_refused(other: KVLayout, words: str) -> None:
    with pytest.raises(HandshakeError, match=words):
        slicings(of_planes(16, Plane(1, 8), Plane(1, 8)), other)
    assert other.kin() != of_planes(16, Plane(1, 8), Plane(1, 8)).kin()


# --- other engines' layouts


def foreign(name: str = "theirs/NHD", block_size: int = 16, size: int = 1000) -> KVLayout:
    return KVLayout(block_size, "fp8_of_theirs", (LayerGroup((0, 1), opaque_bytes=size),), name)


def test_a_foreign_layout_pairs_with_its_equal() -> None:
    found = slicings(foreign(), foreign())
    assert len(found) == 2 and found[0].whole and found[0].piece_bytes == 1000 == foreign().block_bytes(0)
    assert "theirs/NHD" in foreign().describe() and foreign().kin() == foreign().kin()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(foreign()), type=KVLayout) == foreign()


@pytest.mark.parametrize("other", [foreign("theirs/HND"), foreign(block_size=32), foreign(size=1001), layout(16)])
def test_a_foreign_layout_pairs_with_nothing_else(other: KVLayout) -> None:
    for a, b in ((foreign(), other), (other, foreign())):
        with pytest.raises(HandshakeError, match="theirs") as caught:
            slicings(a, b)
        assert a.describe() in str(caught.value) and b.describe() in str(caught.value)
        assert a.kin() != b.kin()


def test_a_layout_travels_as_data() -> None:
    kv = layout(32, 2, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(kv), type=KVLayout) == kv
    assert "heads=2+2/4" in kv.describe()
