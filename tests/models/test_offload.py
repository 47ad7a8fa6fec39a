"""Which layers go to the host's memory: what was asked for, less than a layer more, evenly; and in how many slots."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.config import LAYER_MATRICES
from pd_serve.errors import ConfigError
from pd_serve.models.offload import MOST_SLOTS, Times, Wanted, after, choose_slots, plan, spread, step_ms

sizes = st.lists(
    st.dictionaries(st.sampled_from(LAYER_MATRICES), st.integers(1, 1 << 40), min_size=1), min_size=1, max_size=40
)
names = st.lists(st.sampled_from(LAYER_MATRICES), unique=True)
asked = st.one_of(
    st.integers(1, 1 << 44).map(str), st.integers(1, 100).map("{}%".format), st.integers(1, 50).map("{}layers".format)
)


@settings(max_examples=80, deadline=None)
@given(sizes, names, asked)
def test_at_least_what_is_asked_for_and_less_than_a_layer_more(
    layers: list[dict[str, int]], params: list[str], size: str
) -> None:
    each = [sum(size for name, size in layer.items() if not params or name in params) for layer in layers]
    try:
        made = plan(layers, Wanted("uva", size, tuple(params)))
    except ConfigError as error:
        assert "--weight-offload-" in str(error)
        assert not any(each) or not size.endswith("%")  # no share of what there is is too much
        return
    assert made.host_bytes == sum(each[number] for number in made.layers)
    assert made.device_bytes + made.host_bytes == sum(sum(layer.values()) for layer in layers)
    assert list(made.layers) == sorted(set(made.layers)) and all(each[number] for number in made.layers)
    assert made.host_bytes >= made.asked_bytes > 0
    if size.endswith("layers"):
        assert f"{len(made.layers)}layers" == size
    elif len(set(each)) == 1:
        assert made.host_bytes - made.asked_bytes < each[0]


@given(st.integers(1, 60).flatmap(lambda of: st.tuples(st.integers(1, of), st.just(of))))
def test_layers_are_spread_evenly_around(count_of: tuple[int, int]) -> None:
    count, of = count_of
    places = spread(count, of)
    gaps = [b - a for a, b in itertools.pairwise([*places, places[0] + of])]
    assert places[0] >= 0 and places[-1] < of and len(places) == count
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("size", "params", "words"),
    [
        ("5layers", (), "4 layers with 120B are all"),
        ("121", (), "is 121B: 4 layers"),
        ("1GiB", ("o",), "4 layers with 40B"),
        ("10%", ("experts", "down"), "no layer of the model has such; it has o, qkv"),
    ],
)
def test_too_much_is_an_error_that_says_how_much_there_is(size: str, params: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan([{"qkv": 20, "o": 10}] * 4, Wanted("prefetch", size, params))


times = st.builds(Times, *(st.floats(0.01, 20.0) for _ in range(3)))
rings = st.integers(2, 40).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, min(4, layers - 1))))


@settings(max_examples=60, deadline=None)
@given(rings, times)
def test_a_step_takes_as_long_as_its_bytes_or_its_computing_and_no_longer_than_both(
    ring: tuple[int, int], each: Times
) -> None:
    layers, slots = ring
    ms = step_ms(layers, slots, each)
    moving = sum(after(layer, layers, slots) != layer for layer in range(layers))
    bus, computing = moving * each.copy, layers * (each.own + each.between)
    assert max(bus, computing) <= ms * 1.0001 and ms <= (bus + computing) * 1.0001


@settings(max_examples=60, deadline=None)
@given(rings)
def test_every_layer_follows_one_other_in_its_own_slot(ring: tuple[int, int]) -> None:
    layers, slots = ring
    following = [after(layer, layers, slots) for layer in range(layers)]
    assert sorted(following) == list(range(layers))
    assert all(a % slots == b % slots for a, b in enumerate(following))


@pytest.mark.parametrize(
    ("layers", "each", "slots"),
    [
        (1, Times(8, 0.1, 1), 1),  # as good as on the device, and as large
        (2, Times(8, 0.1, 1), 1),  # two would be
        (16, Times(8, 0.1, 0.1), 1),  # the bus alone counts
        (16, Times(8, 8, 0.1), 2),
        (16, Times(1, 8, 8), 1),  # there is time enough between
    ],
)
def test_slots_are_the_fewest_that_hide_what_can_be_hidden(layers: int, each: Times, slots: int) -> None:
    assert choose_slots(layers, [each]) == slots
    assert choose_slots(layers, [each, Times(8, 8, 0.1)]) == min(2, max(1, layers - 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), times)
def test_there_are_always_fewer_slots_than_layers(layers: int, each: Times) -> None:
    assert 1 <= choose_slots(layers, [each]) <= min(MOST_SLOTS, max(1, layers - 1))
