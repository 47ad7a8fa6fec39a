"""The host tier's books under any order of events, against a model that knows what each block and slot holds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pd_serve.kv.layout import KVLayout, LayerGroup, kv_group
from pd_serve.kv.manager import SequenceBlocks
from pd_serve.kv.tiered import TieredKVManager
from pd_serve.kv.tiers import MAX_BEGUN, Copy

EXAMPLES = int(os.environ.get("TIER_EXAMPLES", "100"))
BLOCK = 4
FULL = kv_group((0,), num_kv_heads=2, head_dim=8)
WINDOW = kv_group((1,), num_kv_heads=2, head_dim=8, window=6)
TEXTS = [[*range(100, 124)], [*range(100, 108), *range(200, 216)], [7] * 20, [*range(50, 70)]]
HORIZON = 6

Prefix = tuple[int, ...]


def manager(groups: tuple[LayerGroup, ...], blocks: int, slots: int, eager: bool) -> TieredKVManager:
    count = len(groups)
    layout = KVLayout(BLOCK, "float32", groups)
    return TieredKVManager(layout, (blocks,) * count, 64, num_slots=(slots,) * count, eager=eager)


@dataclass
class Running:
    blocks: SequenceBlocks
    tokens: list[int]
    done: int  # tokens whose KV is there
    copies: list[Copy] = field(default_factory=list)  # on their way to it
    wanted: bool = True
    end: int = 0  # tokens when they have come


class World:
    """An engine's main thread and its copies, of which each may end whenever it likes."""

    def __init__(self, windowed: bool, blocks: int, slots: int, eager: bool) -> None:
        self.kv = manager((FULL, WINDOW) if windowed else (FULL,), blocks, slots, eager)
        self.device: dict[tuple[int, int], Prefix] = {}
        self.host: dict[tuple[int, int], Prefix] = {}
        self.running: list[Running] = []
        self.loading: list[Running] = []
        self.storing: list[list[Copy]] = []
        self.hits = 0

    # --- what a scheduler does

    def start(self, tokens: list[int], *, compute: bool) -> None:
        kv, array = self.kv, np.array(tokens, np.int32)
        blocks = kv.open(kv.match(array, len(tokens) - 1))
        if not kv.can_extend(blocks, len(tokens)):
            kv.close(blocks)
            return
        run = Running(blocks, tokens, blocks.num_committed * BLOCK)
        reach = kv.reach(blocks, array, len(tokens) - 1)
        if reach.path and not compute:
            run.copies, run.end = kv.fetch(blocks, reach), reach.num_tokens
            self.hits += len(run.copies)
            kv.extend(blocks, len(tokens))
            self.loading.append(run)
            return
        kv.extend(blocks, len(tokens))
        self.compute(run, len(tokens))
        self.running.append(run)

    def compute(self, run: Running, end: int) -> None:
        self.sees_its_own(run, run.done)
        self.write(run, run.done, end)
        self.kv.commit(run.blocks, np.array(run.tokens, np.int32), end)
        run.done = end

    def write(self, run: Running, start: int, end: int) -> None:
        for group, table in enumerate(run.blocks.tables):
            for i in range(start // BLOCK, -(-end // BLOCK)):
                if block := int(table[i]):
                    self.device[group, block] = tuple(run.tokens[: min(end, (i + 1) * BLOCK)])

    def grow(self, run: Running, token: int) -> None:
        if len(run.tokens) < 60 and self.kv.can_extend(run.blocks, len(run.tokens) + 1):
            run.tokens = [*run.tokens, token]
            self.kv.extend(run.blocks, len(run.tokens))
            self.compute(run, len(run.tokens))

    def end(self, run: Running) -> None:
        self.running.remove(run)
        self.kv.close(run.blocks)

    # --- what copies do

    def store(self) -> None:
        if copies := self.kv.tier.stores(self.kv.pools, HORIZON):
            self.storing.append(copies)

    def stored(self, copies: list[Copy], whole: bool) -> None:
        self.storing.remove(copies)
        for group, block, slot in copies:
            self.host[group, slot] = self.device[group, block]  # whatever is there by now
        self.kv.tier.stored(copies, whole=whole)

    def loaded(self, run: Running, whole: bool) -> None:
        self.loading.remove(run)
        for group, block, slot in run.copies:
            self.device[group, block] = self.host[group, slot]
        self.kv.tier.loaded(run.copies, whole=whole)
        if not (whole and run.wanted):
            self.kv.close(run.blocks)
            return
        self.kv.commit(run.blocks, np.array(run.tokens, np.int32), run.end)
        run.done = run.end
        self.compute(run, len(run.tokens))
        self.running.append(run)

    def reset(self) -> None:
        self.kv.tier.forget()
        self.kv.forget([run.blocks for run in [*self.running, *self.loading]])
        for run in self.loading:
            run.wanted = False
        for text in TEXTS:
            assert not self.kv.match(np.array(text, np.int32), len(text)).num_tokens

    def sleep(self, level: int) -> None:
        self.settle()
        self.kv.reset()
        if level == 2:
            self.kv.tier.forget()
        self.device.clear()

    def settle(self) -> None:
        while self.storing:
            self.stored(self.storing[0], True)
        while self.loading:
            self.loaded(self.loading[0], True)
        while self.running:
            self.end(self.running[0])

    # --- what must be so

    def sees_its_own(self, run: Running, done: int) -> None:
        for group, table in enumerate(run.blocks.tables):
            for i in range(self.kv.layout.first_live_block(group, done), -(-done // BLOCK)):
                assert table[i], "what a token sees has no block"
                assert self.device[group, int(table[i])][:done] == tuple(run.tokens[: min(done, (i + 1) * BLOCK)])

    def check(self) -> None:
        self.kv.check(idle=not (self.running or self.loading or self.storing))
        for run in self.running:
            self.sees_its_own(run, run.done)


def play(world: World, orders: bytes) -> None:
    """Two bytes an event: what, and with which of those there are."""
    for what, which in zip(orders[::2], orders[1::2], strict=False):
        of = world.running[which % len(world.running)] if world.running else None
        match what % 16:
            case 0 | 1 | 2 | 3:
                text = TEXTS[which % 4]
                world.start(text[: 1 + which // 4 % len(text)] + [which] * (which % 3), compute=what > 240)
            case 4 if of:
                world.grow(of, which % 2)
            case 5 | 6 | 7 | 8 if of:
                world.end(of)
            case 9 | 10:
                world.store()
            case 11 | 12 if world.storing:
                world.stored(world.storing[which % len(world.storing)], what < 230)
            case 13 if world.loading:
                world.loaded(world.loading[which % len(world.loading)], what < 230)
            case 14 if world.loading and which < 60:
                world.loading[which % len(world.loading)].wanted = False
            case 15 if which < 30:
                world.reset()
            case 15 if which > 240:
                world.sleep(1 + which % 2)
        world.check()


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    windowed=st.booleans(),
    blocks=st.integers(8, 14),
    slots=st.integers(2, 30),
    eager=st.booleans(),
    seed=st.integers(0, 2**32),
    events=st.sampled_from([20, 60, 200]),
)
def test_any_order_of_events(windowed: bool, blocks: int, slots: int, eager: bool, seed: int, events: int) -> None:
    world = World(windowed, blocks, slots, eager)
    play(world, random.Random(seed).randbytes(2 * events))
    event(f"brought back: {world.hits > 0}, spoiled: {world.kv.tier.counts.spoiled > 0}")
    world.settle()
    world.kv.check(idle=True)
    world.reset()
    assert sum(usage.cached + usage.used for usage in [*world.kv.usage(), *world.kv.tier.usage()]) == 0
    assert not world.kv._tree.num_nodes


@pytest.fixture(params=[True, False], ids=["eager", "lazy"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(windowed=True, blocks=13, slots=40, eager=request.param)
    yield world
    world.settle()
    world.kv.check(idle=True)


def finish(world: World, tokens: list[int]) -> None:
    """Computes and ends it, with all copies it leads to."""
    for again in range(2):
        world.store()
        while world.storing:
            world.stored(world.storing[0], True)
            world.store()
        if not again:
            world.start(tokens, compute=False)
            while world.loading:
                world.loaded(world.loading[0], True)
            world.end(world.running[-1])


def test_what_left_the_device_is_found_in_the_host_tier(world: World) -> None:
    first, others = TEXTS[0], [[n] * 22 for n in range(4)]
    finish(world, first)
    for other in others:
        finish(world, other)
    array = np.array(first, np.int32)
    assert not world.kv.match(array, len(first)).num_tokens
    world.start(first, compute=False)
    assert world.loading[0].end == 20  # the last token is computed, and with it its block
    assert {copy.group for copy in world.loading[0].copies} == {0, 1}
    assert sum(copy.group == 1 for copy in world.loading[0].copies) == 2  # what the window still sees


def test_a_block_given_up_and_computed_again_is_stored_again() -> None:
    world = World(windowed=False, blocks=7, slots=4, eager=False)  # 3 copies have room
    for _ in range(3):
        before = world.kv.tier.counts.stored
        for text in (1, 2, 3, 4):
            finish(world, [text] * 9)
        assert world.kv.tier.counts.stored > before
    assert world.kv.tier.counts.evicted and world.kv.tier.usage()[0].cached == 3


def test_nothing_is_stored_twice(world: World) -> None:
    for _ in range(3):
        finish(world, TEXTS[0])
    stored = world.kv.tier.counts.stored
    assert stored <= 12  # 6 blocks in each group
    world.store()
    assert not world.storing and world.kv.tier.counts.stored == stored


def test_a_copy_whose_block_is_taken_meanwhile_is_not_served() -> None:
    world = World(windowed=False, blocks=7, slots=40, eager=True)
    world.start(TEXTS[0], compute=False)
    world.store()
    world.end(world.running[0])
    world.start([1] * 22, compute=False)  # takes all blocks
    world.end(world.running[0])
    world.stored(world.storing[0], True)
    assert world.kv.tier.counts == type(world.kv.tier.counts)(spoiled=6)
    assert not world.kv.reach(world.kv.open(world.kv.match(np.zeros(0, np.int32), 0)), np.array(TEXTS[0]), 24).path


def test_what_is_being_loaded_is_not_given_up() -> None:
    world = World(windowed=False, blocks=8, slots=6, eager=True)  # 5 copies have room
    finish(world, TEXTS[0][:21])
    for other in (1, 2):
        world.start([other] * 22, compute=False)
        world.end(world.running[0])  # nothing of it is stored
    world.start(TEXTS[0][:21], compute=False)
    assert len(world.loading[0].copies) == 5
    world.store()
    assert not world.storing  # all slots are held
    world.loaded(world.loading[0], True)
    world.end(world.running[0])
    world.store()
    assert world.storing


def test_what_is_begun_at_once_is_bounded_and_nothing_is_left_out() -> None:
    kv = manager((FULL, WINDOW), 400, 400, eager=True)
    blocks = []
    for text in range(10):
        tokens = np.array([text, *range(1000, 1059)], np.int32)
        opened = kv.open(kv.match(tokens, len(tokens) - 1))
        kv.extend(opened, len(tokens))
        kv.commit(opened, tokens, len(tokens))
        blocks.append(opened)
    begun: list[Copy] = []
    while copies := kv.tier.stores(kv.pools, 0):
        for group in (0, 1):
            assert sum(copy.group == group for copy in copies) <= MAX_BEGUN
        kv.tier.stored(copies)
        begun += copies
    assert len(begun) == len(set(begun)) and sum(copy.group == 0 for copy in begun) == 150
    for opened in blocks:
        kv.close(opened)
    kv.check(idle=True)


def test_only_what_has_come_into_sight_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = manager((FULL,), 100, 400, eager=False)
    pool, looked = kv.pools[0], list[int]()
    owner = pool.owner
    monkeypatch.setattr(pool, "owner", lambda block: (looked.append(block), owner(block))[1])

    def begun(text: int) -> int:
        tokens = np.array([text] * 21, np.int32)
        opened = kv.open(kv.match(tokens, len(tokens) - 1))
        kv.extend(opened, len(tokens))
        kv.commit(opened, tokens, len(tokens))
        kv.close(opened)
        looked.clear()
        copies = kv.tier.stores(kv.pools, 60)
        kv.tier.stored(copies)
        return len(copies)

    assert [begun(text) for text in range(4)] == [5] * 4
    assert len(looked) == 5  # of twenty
    assert [begun(text) for text in range(4, 30)] == [5] * 26  # more than the cache has room for
    assert len(looked) <= 6
    kv.forget([])
    kv.tier.forget()
    assert begun(1) == 5
    kv.check(idle=True)
