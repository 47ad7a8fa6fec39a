"""Properties of the block pool and the prefix cache under any order of operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pd_serve.errors import PoolExhausted
from pd_serve.kv.layout import KVLayout, LayerGroup, kv_group
from pd_serve.kv.manager import KVManager, SequenceBlocks
from pd_serve.wire.chunks import chain, start

BLOCK = 4
FULL = kv_group((0, 2), num_kv_heads=2, head_dim=8)
WINDOW = kv_group((1, 3), num_kv_heads=2, head_dim=8, window=6)


def layout(*groups: LayerGroup) -> KVLayout:
    return KVLayout(BLOCK, "float32", groups)


def compute(kv: KVManager, tokens: list[int], salt: bytes = b"") -> SequenceBlocks:
    """Runs a sequence through the cache as an engine would, in one chunk."""
    array = np.array(tokens, dtype=np.int32)
    blocks = kv.open(kv.match(array, len(tokens) - 1, salt))
    kv.extend(blocks, len(tokens))
    kv.commit(blocks, array, len(tokens))
    return blocks


def cached(kv: KVManager, tokens: list[int], salt: bytes = b"") -> int:
    return kv.match(np.array(tokens, dtype=np.int32), len(tokens), salt).num_tokens


def compute_names(kv: KVManager, tokens: list[int], salt: bytes) -> list[int]:
    """What routers are told of it."""
    kv.close(compute(kv, tokens, salt))
    return kv.named.take()[0]


def test_a_prefix_is_found_again_and_only_whole_blocks_of_it() -> None:
    kv = KVManager(layout(FULL), (17,), 64)
    kv.close(compute(kv, list(range(10))))
    assert cached(kv, list(range(10))) == 8
    assert cached(kv, [0, 1, 2, 3, 9, 9, 9, 9]) == 4
    assert cached(kv, [9, 1, 2, 3]) == 0
    kv.check(idle=True)


def test_the_same_block_after_another_prefix_is_another_block() -> None:
    kv = KVManager(layout(FULL), (17,), 64)
    kv.close(compute(kv, [1, 1, 1, 1, 7, 7, 7, 7, 0]))
    assert cached(kv, [2, 2, 2, 2, 7, 7, 7, 7]) == 0
    assert cached(kv, [1, 1, 1, 1, 7, 7, 7, 7]) == 8


def test_equal_hashes_of_different_tokens_are_not_confused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Collides(bytes):
        def __hash__(self) -> int:
            return 1

        __eq__ = bytes.__eq__

    from pd_serve.kv import manager as module

    real = module.block_keys
    monkeypatch.setattr(module, "block_keys", lambda *a: [Collides(k) for k in real(*a)])
    kv = KVManager(layout(FULL), (17,), 64)
    kv.close(compute(kv, [1, 1, 1, 1, 5]))
    assert cached(kv, [2, 2, 2, 2]) == 0
    assert cached(kv, [1, 1, 1, 1]) == 4


def test_equal_prompts_with_other_salts_share_nothing() -> None:
    kv = KVManager(layout(FULL), (65,), 64)
    prompt = list(range(10))
    salts = (b"", b"a", b"b", b"a\0", b"\1")
    held = [compute(kv, prompt, salt) for salt in salts]
    assert len({int(block) for blocks in held for block in blocks.tables[0][:3]}) == 3 * len(salts)
    for blocks in held:
        kv.close(blocks)
    kv.check(idle=True)
    assert [cached(kv, prompt, salt) for salt in (*salts, b"c")] == [8] * len(salts) + [0]
    again = compute(kv, prompt, b"a")
    kv.close(again)
    kv.close(compute(kv, [99] * 60))  # evicts them one by one
    for at in range(100, 700, 100):
        kv.close(compute(kv, list(range(at, at + 60))))
    assert [cached(kv, prompt, salt) for salt in salts] == [0] * len(salts)
    kv.check(idle=True)


def test_prefixes_with_other_salts_have_other_names() -> None:
    kv = KVManager(KVLayout(256, "float32", (FULL,)), (65,), 2048, fingerprint="f")
    prompt = list(range(1100))
    names = {salt: set(compute_names(kv, prompt, salt)) for salt in (b"", b"a", b"b")}
    tokens = np.array(prompt, "<i4").tobytes()
    assert names == {salt: set(chain("f", tokens, start(salt))) for salt in names}
    assert len(set().union(*names.values())) == 6
    kv.close(compute(kv, prompt[:600] + [7] * 500, b"a"))  # goes on from a name that is found
    come, _ = kv.named.take()
    assert come == chain("f", np.array(prompt[:600] + [7] * 500, "<i4").tobytes(), start(b"a"))[1:]


def test_the_least_recently_used_tail_goes_first() -> None:
    kv = KVManager(layout(FULL), (5,), 64)  # 4 blocks
    kv.close(compute(kv, [*range(12), 99]))  # 3 full blocks and one partial
    blocks = compute(kv, [50, 51])
    assert cached(kv, list(range(12))) == 12  # the partial block had no content and went first
    more = compute(kv, [60, 61])
    assert cached(kv, list(range(12))) == 8
    kv.close(blocks)
    kv.close(more)
    kv.check(idle=True)


def test_a_window_gives_blocks_back_and_still_hits() -> None:
    kv = KVManager(layout(FULL, WINDOW), (33, 33), 128)
    blocks = compute(kv, list(range(20)))
    used_full, used_window = (u.used for u in kv.usage())
    assert used_full == 5
    # the token at position 20 sees positions 15 to 19: logical blocks 3 and 4
    assert used_window == 2
    assert cached(kv, list(range(20))) == 20
    kv.close(blocks)
    kv.check(idle=True)


def test_a_hit_is_shortened_to_where_the_window_is_complete() -> None:
    kv = KVManager(layout(FULL, WINDOW), (33, 5), 128)
    kv.close(compute(kv, list(range(16))))
    kv.close(compute(kv, [77] * 9))  # takes window blocks of the first prompt
    hit = cached(kv, list(range(16)))
    match = kv.match(np.arange(16, dtype=np.int32), 16)
    for node in match.path[kv.layout.first_live_block(1, hit) :]:
        assert node.blocks[1]
    kv.check(idle=True)


def test_a_pull_takes_only_what_later_tokens_see() -> None:
    kv = KVManager(layout(FULL, WINDOW), (33, 33), 128)
    tokens = np.arange(22, dtype=np.int32)
    blocks = kv.open(kv.match(tokens, 22))
    kv.extend(blocks, 22, live_only=True)
    assert [u.used for u in kv.usage()] == [6, 3]  # a token at 20 sees 15 to 19: blocks 3 to 5
    assert not blocks.tables[1][:3].any()
    kv.commit(blocks, tokens, 22)
    assert cached(kv, list(range(22))) == 20
    kv.close(blocks)
    kv.check(idle=True)


def test_blocks_that_may_not_be_whole_are_offered_to_nobody() -> None:
    kv = KVManager(layout(FULL, WINDOW), (33, 33), 128)
    tokens = np.arange(22, dtype=np.int32)
    blocks = kv.open(kv.match(tokens, 22))
    kv.extend(blocks, 22, live_only=True)
    kv.commit(blocks, tokens, 22, whole_from=(0, 4))  # of block 3 a part is missing
    assert cached(kv, list(range(22))) == 0  # a token at 20 sees 15, which is in it
    more = np.arange(30, dtype=np.int32)
    kv.extend(blocks, 30)
    kv.commit(blocks, more, 30)
    assert cached(kv, list(range(30))) == 28
    kv.close(blocks)
    kv.check(idle=True)


def test_nodes_are_kin_whatever_their_block_size_and_share_of_the_heads() -> None:
    mine = layout(FULL, WINDOW)
    half = [kv_group(g.layers, 1, 8, g.window, first_head=1, total_kv_heads=2) for g in (FULL, WINDOW)]
    assert KVLayout(16, "float32", tuple(half)).kin() == mine.kin()
    for other in (KVLayout(BLOCK, "bfloat16", mine.groups), layout(FULL), layout(WINDOW, FULL)):
        assert other.kin() != mine.kin()


def test_too_much_takes_nothing() -> None:
    kv = KVManager(layout(FULL), (4,), 64)
    blocks = kv.open(kv.match(np.arange(3, dtype=np.int32), 0))
    with pytest.raises(PoolExhausted):
        kv.extend(blocks, 16)
    assert kv.usage()[0].used == 0
    kv.close(blocks)


def test_a_double_release_is_an_error() -> None:
    kv = KVManager(layout(FULL), (4,), 64)
    pool = kv._pools[0]
    (block,) = pool.take(1)
    pool.release([block])
    with pytest.raises(ValueError, match="more often"):
        pool.release([block])


class Books(RuleBasedStateMachine):
    """Random sequences that start, grow, are pulled, fork and end; a model remembers what each block must hold."""

    @initialize(
        blocks=st.integers(6, 24),
        groups=st.sampled_from([(FULL,), (FULL, WINDOW), (WINDOW,)]),
        caching=st.booleans(),
    )
    def start(self, blocks: int, groups: tuple[LayerGroup, ...], caching: bool) -> None:
        self.kv = KVManager(layout(*groups), (blocks,) * len(groups), 64, prefix_caching=caching)
        self.live: list[tuple[SequenceBlocks, list[int], int]] = []
        # what was last written into each pool block: (the tokens up to and including that block)
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    def write(self, blocks: SequenceBlocks, tokens: list[int], begin: int, end: int) -> None:
        for group in range(len(self.kv.layout.groups)):
            for i in range(begin // BLOCK, -(-end // BLOCK)):
                block = int(blocks.tables[group][i])
                if block:
                    self.content[group, block] = tuple(tokens[: min(end, (i + 1) * BLOCK)])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), pulled=st.booleans())
    def begin(self, tokens: list[int], pulled: bool) -> None:
        array = np.array(tokens, dtype=np.int32)
        match = self.kv.match(array, len(tokens) if pulled else len(tokens) - 1)
        assert match.num_tokens <= len(tokens) - (not pulled)
        for group in range(len(self.kv.layout.groups)):
            first = self.kv.layout.first_live_block(group, match.num_tokens)
            for i, node in enumerate(match.path):
                if i >= first:  # a hit: the block must hold exactly these tokens after exactly these
                    assert self.content[group, node.blocks[group]] == tuple(tokens[: (i + 1) * BLOCK])
        blocks = self.kv.open(match)
        if not self.kv.can_extend(blocks, len(tokens), live_only=pulled):
            self.kv.close(blocks)
            return
        self.kv.extend(blocks, len(tokens), live_only=pulled)
        self.write(blocks, tokens, match.num_tokens, len(tokens))
        self.kv.commit(blocks, array, len(tokens))
        self.live.append((blocks, tokens, len(tokens)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        i = data.draw(st.integers(0, len(self.live) - 1))
        blocks, tokens, done = self.live[i]
        longer = tokens + more
        if len(longer) > 60 or not self.kv.can_extend(blocks, len(longer)):
            return
        self.kv.extend(blocks, len(longer))
        self.write(blocks, longer, done, len(longer))
        self.kv.commit(blocks, np.array(longer, dtype=np.int32), len(longer))
        self.live[i] = (blocks, longer, len(longer))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks, _, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.kv.close(blocks)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check(idle=not self.live)
        for group, usage in enumerate(self.kv.usage()):
            held = {int(b) for s, _, _ in self.live for b in s.tables[group] if b}
            assert usage.used == len(held)
            assert usage.used + usage.cached + usage.free == usage.total

    @invariant()
    def what_a_sequence_sees_is_its_own(self) -> None:
        for blocks, tokens, done in getattr(self, "live", []):
            for group in range(len(self.kv.layout.groups)):
                for i in range(self.kv.layout.first_live_block(group, done), -(-done // BLOCK)):
                    block = int(blocks.tables[group][i])
                    assert block
                    assert self.content[group, block] == tuple(tokens[: min(done, (i + 1) * BLOCK)])


Books.TestCase.settings = settings(max_examples=75, stateful_step_count=30, deadline=None)
TestBooks = Books.TestCase
