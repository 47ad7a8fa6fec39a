"""Which layers' matrices lie in the host's memory, and in how many slots a device meets them: arithmetic, no torch.

Called when weights are loaded (:class:`pd_serve.models.weights`, :mod:`pd_serve.compute.cuda.offload`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pd_serve.errors import ConfigError
from pd_serve.values import amount, readable_size

MOST_SLOTS = 4
_WORTH = 1.05  # one more slot, a layer of memory, has to make a step shorter than by this
_STEPS = 24  # that are gone through, of which the later half counts


@dataclass(frozen=True)
class Wanted:
    """``mode``: "uva" | "prefetch". ``size``: see :data:`pd_serve.values.AMOUNT`. ``params``: none: all there are."""

    mode: str
    size: str
    params: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """``layers``: in order. ``params``: what of them lies in the host's memory. Bytes are a rank's."""

    layers: tuple[int, ...]
    params: frozenset[str]
    asked_bytes: int
    host_bytes: int
    device_bytes: int  # of the same layers' matrices and of all others' that stay


def plan(sizes: Sequence[Mapping[str, int]], wanted: Wanted) -> Plan:
    """``sizes``: bytes of each layer's matrices by name. Whole layers, spread evenly over those that have any of them.

    At least what is asked for, and less than a layer more. Raises ConfigError.
    """
    found = {name for layer in sizes for name in layer}
    params = frozenset(wanted.params) or frozenset(found)
    each = [sum(size for name, size in layer.items() if name in params) for layer in sizes]
    able = [number for number, size in enumerate(each) if size]
    if not able:
        raise ConfigError(
            f"--weight-offload-params {','.join(wanted.params)}: no layer of the model has such; it has "
            f"{', '.join(sorted(found))}"
        )
    asked, total = amount(wanted.size), sum(each)
    most = f"{len(able)} layers with {readable_size(total)} are all that can be"
    if asked.unit == "layers":
        count = int(asked.number)
        if count > len(able):
            raise ConfigError(f"--weight-offload-size {wanted.size}: {most}")
        asked_bytes = sum(each[able[at]] for at in spread(count, len(able)))
    else:
        asked_bytes = math.ceil(asked.number * total / 100) if asked.unit == "%" else int(asked.number)
        if asked_bytes > total:
            raise ConfigError(f"--weight-offload-size {wanted.size} is {readable_size(asked_bytes)}: {most}")
        count = 1
        while sum(each[able[at]] for at in spread(count, len(able))) < asked_bytes:
            count += 1
    layers = tuple(able[at] for at in spread(count, len(able)))
    host = sum(each[number] for number in layers)
    return Plan(layers, params, asked_bytes, host, sum(size for layer in sizes for size in layer.values()) - host)


def spread(count: int, of: int) -> list[int]:
    """``count`` of ``of`` places, as even as can be, also from the last one of a round to the first of the next."""
    return [(2 * i + 1) * of // (2 * count) for i in range(count)]


class Times(NamedTuple):
    """Milliseconds of a step with layers that are brought to the device: of each one's copy, of computing it, and of
    what is computed between two of them."""

    copy: float
    own: float
    between: float


def step_ms(layers: int, slots: int, times: Times) -> float:
    """Of a step of many, where the nth of ``layers`` has slot ``n % slots``, and is copied to it as soon as the one
    before it there was computed. One copy runs at a time, in the order in which they could begin."""
    computed = bus = 0.0
    arrived = [0.0] * layers
    began = 0.0
    for turn, layer in itertools.product(range(_STEPS), range(layers)):
        if layer == 0 and turn == _STEPS // 2:
            began = computed
        computed = max(computed + times.between, arrived[layer]) + times.own
        following = after(layer, layers, slots)
        if following != layer:
            bus = arrived[following] = max(bus, computed) + times.copy
    return (computed - began) / (_STEPS - _STEPS // 2)


def after(layer: int, layers: int, slots: int) -> int:
    """Which one has the slot next, by number among those that are copied: the first with that slot after the last.

    A layer that has a slot for itself follows itself, and is never copied again.
    """
    return layer + slots if layer + slots < layers else layer % slots


def choose_slots(layers: int, kinds: Collection[Times]) -> int:
    """The fewest that make steps of all these kinds as short as more would. Fewer than layers, but for a single one."""
    most = min(MOST_SLOTS, max(1, layers - 1))
    best = [min(step_ms(layers, slots, times) for slots in range(1, most + 1)) for times in kinds]
    for slots in range(1, most):
        if all(step_ms(layers, slots, times) <= _WORTH * ms for times, ms in zip(kinds, best, strict=True)):
            return slots
    return most
