"""The real loop with a host tier, under long random sessions that bring the same prompts back again and again.

See :mod:`tests.engine.test_loop`, whose executor knows what every block holds: KV of another text, a stale one, or one
that has not come is found out. Here the pool is so small that most of what comes back has left it.
"""

from __future__ import annotations

import os
import random

import numpy as np
import numpy.typing as npt
import pytest

from pd_serve.engine.rates import Rates
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.tiered import TieredKVManager
from pd_serve.router.prefixes import HOST_WORTH, Prefixes
from pd_serve.wire import engine as wire
from pd_serve.wire import link
from pd_serve.wire.chunks import chain
from tests.engine.test_loop import STARTS, Request, World, check_stream

SESSIONS = int(os.environ.get("TIER_SESSIONS", "6"))
TEXTS = [*STARTS, [6, 7] * 9, [9, 8, 7, 3] * 5, [4] * 17]


def request(rng: random.Random) -> Request:
    text = rng.choice(TEXTS)
    prompt = [*text[: rng.randint(len(text) // 2, len(text))], *([rng.randrange(2, 9)] * rng.randint(0, 3))]
    sampling = link.SamplingParams(max_tokens=rng.choice([3, 8, 20]), seed=rng.getrandbits(32), ignore_eos=True)
    kind = rng.choice(["local"] * 6 + ["handoff", "pull"])
    return Request(kind, tuple(prompt), 0, rng.randint(0, 3), sampling)


def play(world: World, rng: random.Random, events: int) -> None:
    for _ in range(events):
        streams = len(world.wire.streams)
        match rng.randrange(16):
            case 0 | 1 | 2 | 3 | 4:
                world.happens("submit", request(rng))
            case 5:
                world.happens("abort", rng.randrange(max(1, streams - 4), streams + 1) if streams else 99)
            case 6:
                world.happens("copies", (rng.randint(0, 3), rng.random() < 0.1))
            case 7:
                world.happens(rng.choice(["place", "arrive", "release", "release"]), None)
            case 8 if rng.random() < 0.2:
                world.happens("forget", None)
            case 9 if rng.random() < 0.2:
                world.happens("sleep", rng.random() < 0.5)
            case 10:
                world.happens("wake", None)
            case 11 if rng.random() < 0.2:
                world.happens("fail", rng.choice(["launch", "collect"]))
            case _:
                for _ in range(rng.randint(1, 6)):
                    world.turn()


def settled(world: World) -> World:
    world.settle()
    for stream in world.wire.streams.values():
        check_stream(world, stream)
    world.kv.check(idle=True)
    assert world.wire.status.counters["leaks"] == 0
    return world


@pytest.mark.parametrize("tier", ["eager", "lazy"])
def test_long_sessions_lose_nothing_and_mix_nothing_up(tier: str) -> None:
    found = dict.fromkeys(["host_kv_hit_tokens", "host_kv_spoiled_blocks", "host_kv_failed_copies", "preemptions"], 0.0)
    for seed in range(SESSIONS):
        rng = random.Random(seed)
        world = World(rng.randint(0, 1), rng.randint(12, 15), rng.randint(8, 40), rng.random() < 0.5, tier=tier)
        play(world, rng, 80)
        settled(world)
        counters = world.engine._counter_snapshot()
        for name in found:
            found[name] += counters[name]
        world.engine.close()
    assert all(found.values()), f"the sessions did not have all that they are for: {found}"


def submit(world: World, prompt: list[int]) -> str:
    name = f"s{len(world.wire.streams)}"
    sampling = link.SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    world.happens("submit", Request("local", tuple(prompt), 0, 0, sampling))
    return name


def finished(world: World, prompt: list[int]) -> link.Output:
    """The first output for it, when all of it is there."""
    name = submit(world, prompt)
    settled(world)
    return next(output for output in world.wire.streams[name].heard if output.tokens)


def evicted(world: World) -> None:
    """Nothing of before is on the device any more."""
    for number in range(2, 5):
        finished(world, [number] * 26)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tier", ["eager", "lazy"])
def test_what_comes_back_counts_as_cached(tier: str, depth: int) -> None:
    world, prompt = World(depth, 14, 40, False, tier=tier, slots=60), TEXTS[0] + [2]
    assert finished(world, prompt).num_cached == 0
    evicted(world)
    assert not world.kv.match(np.array(prompt, np.int32), 17).num_tokens
    assert finished(world, prompt).num_cached == 16
    assert world.wire.status.counters["host_kv_hit_tokens"] == 16
    assert world.wire.status.load.host_groups[0].cached > 4


def test_routers_hear_of_names_in_both_places() -> None:
    layout = KVLayout(256, "float32", (kv_group((0,), 1, 8),))
    kv = TieredKVManager(layout, (7,), 4096, num_slots=(9,), eager=True)
    tokens = np.arange(1100, dtype=np.int32)

    def compute(tokens: npt.NDArray[np.int32]) -> None:
        blocks = kv.open(kv.match(tokens, len(tokens) - 1))
        kv.extend(blocks, len(tokens))
        kv.commit(blocks, tokens, len(tokens))
        kv.close(blocks)

    assert kv.far is not None
    router = Prefixes()

    def tell() -> int:
        """What is thought of the prompt after what changed."""
        assert kv.far is not None
        (stored, evicted), (put_by, dropped) = kv.named.take(), kv.far.take()
        router.put_by("n", put_by)
        router.evicted("n", evicted)
        router.stored("n", stored)
        router.dropped("n", dropped)
        return router.tokens("n", names)

    names = chain("", tokens.tobytes())
    compute(tokens)
    assert tell() == 1024
    kv.tier.stored(kv.tier.stores(kv.pools, 0))
    assert tell() == 1024
    compute(tokens + 5000)  # takes all of the device
    assert tell() == int(1024 * HOST_WORTH)
    kv.tier.forget()
    assert tell() == 0
    kv.check(idle=True)


def test_two_with_one_prompt_load_it_once() -> None:
    world, prompt = World(0, 14, 40, False, tier="eager", slots=60), TEXTS[0] + [2]
    finished(world, prompt)
    evicted(world)
    submit(world, prompt)
    submit(world, prompt)
    settled(world)
    assert world.copies.loaded == 1
    assert world.wire.status.counters["host_kv_loaded_blocks"] == 4


def test_an_abort_while_it_is_loaded_keeps_its_blocks_until_the_copies_have_ended() -> None:
    world, prompt = World(0, 14, 40, False, tier="eager", slots=60), TEXTS[0] + [2]
    finished(world, prompt)
    evicted(world)
    world.copies.pace = 0
    submit(world, prompt)
    world.turn()
    assert world.copies.asked
    world.happens("abort", len(world.wire.streams) - 1)
    for _ in range(3):
        world.turn()
    assert world.kv.usage()[0].used == 5
    settled(world)


def test_a_reset_while_it_is_loaded_has_it_computed() -> None:
    world, prompt = World(0, 14, 40, False, tier="eager", slots=60), TEXTS[0] + [2]
    finished(world, prompt)
    evicted(world)
    world.copies.pace = 0
    name = submit(world, prompt)
    world.turn()
    assert world.copies.asked
    world.happens("forget", None)
    world.turn()
    assert world.orders in world.wire.answers  # it waits for no copy
    settled(world)
    assert next(output for output in world.wire.streams[name].heard if output.tokens).num_cached == 0


def test_a_sleep_keeps_the_tier_and_a_deep_one_does_not() -> None:
    for level, cached in ((1, 16), (2, 0)):
        world, prompt = World(0, 14, 40, False, tier="eager", slots=60), TEXTS[0] + [2]
        finished(world, prompt)
        world.orders += 1
        world.tell(wire.Sleep(world.orders, level))
        for _ in range(3):
            world.turn()
        assert world.lifecycle.level == level
        world.happens("wake", None)
        assert finished(world, prompt).num_cached == cached


def test_what_is_sooner_computed_is_not_brought_back() -> None:
    rates = Rates()
    assert rates.load_pays()  # nothing is known
    rates.compute.add(1000, 1.0)
    rates.load.add(1000, 0.1)
    assert rates.load_pays()
    for _ in range(40):
        rates.load.add(1000, 9.0)
    tries = [rates.load_pays() for _ in range(32)]
    assert sum(tries) == 2  # now and then, as it may have changed
