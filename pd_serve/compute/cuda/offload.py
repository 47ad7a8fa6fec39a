"""Weights that a GPU has no room for: in the host's memory, read over the bus or brought to slots of a ring.

Owned by the executor, filled by the loader (:class:`pd_serve.models.interface.Offload`). What the device computes with
are other tensors of the same shapes, so kernels and their order are those of a model that lies on the device, and so is
every bit of the result. What is done at a layer's border happens between CUDA graphs, never within one: copies go on
while a step ends and the next begins, and a step that failed half-way leaves nothing behind that graphs rely on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from pd_serve.compute.cuda.pieces import Pieces
from pd_serve.errors import ConfigError, PDServeError
from pd_serve.memory.host_buffers import HostBuffer
from pd_serve.memory.usage import WEIGHTS
from pd_serve.models.interface import Home, Offload
from pd_serve.models.layers import DecoderLayer
from pd_serve.models.offload import Plan, Times, Wanted, after, choose_slots, plan
from pd_serve.preflight import memory_bytes
from pd_serve.values import readable_size
from pd_serve.wire.memory import TagUsage

log = logging.getLogger(__name__)

_ALIGNMENT = 512  # of matrices: what torch gives those on the device, so that kernels are chosen alike
_ATTENTION = frozenset(("qkv", "o"))


class Bus(Protocol):
    """What is needed of a device (:class:`pd_serve.compute.cuda.bus.CudaBus`). Nothing waits on the host."""

    def buffer(self, size: int) -> HostBuffer:
        """Exactly so much of the host, in whole pages, registered where that is to be. Raises OSError, MemoryError."""

    def mapped(self, buffer: HostBuffer) -> Tensor:
        """Its bytes as kernels read them over the bus. Raises PDServeError where they cannot."""

    def add_slot(self, size: int) -> Tensor:
        """Memory of the device, at an address that stays: the next slot."""

    def copy(self, slot: int, source: Tensor) -> None:
        """Queues a copy to a slot, behind what was computed up to its last :meth:`leave`, and behind other copies."""

    def wait(self, slot: int) -> None:
        """What is computed from now on is so after the last copy to the slot."""

    def leave(self, slot: int) -> None:
        """What was computed until now may have read the slot; what comes does not, until it waits again."""

    def copy_rate(self, source: Tensor, slot: int) -> float:
        """Bytes a second of copies from the host, measured with a slot that nobody uses."""

    def read_rate(self, seen: Tensor) -> float:
        """Bytes a second of kernels that read this, measured."""

    def close(self) -> None: ...


class HostWeights:
    """``ranks``: that share the host's memory. The device's memory is taken under whatever pool is current."""

    def __init__(self, wanted: Wanted, bus: Bus, *, ranks: int = 1) -> None:
        self.plan_made = Plan((), frozenset(), 0, 0, 0)
        self.ring: Ring | None = None
        self.copy_rate = self.read_rate = 0.0  # over the bus, bytes a second
        self._wanted = wanted
        self._bus = bus
        self._ranks = ranks
        self._copied: dict[int, _Layer] = {}  # what the ring brings of each layer
        self._read: dict[int, _Layer] = {}  # what kernels read where it is
        self._num_layers = 0

    def plan(self, sizes: Sequence[Mapping[str, int]]) -> None:
        """Decides which layers it keeps, and takes the memory for them. Raises PDServeError, OSError, MemoryError."""
        self.plan_made = made = plan(sizes, self._wanted)
        self._num_layers = len(sizes)
        each, present, free = made.host_bytes, memory_bytes(), memory_bytes(free=True)
        if each * self._ranks > present or each > free:  # other ranks may have taken theirs already
            raise ConfigError(
                f"--weight-offload-size {self._wanted.size}: weights of {readable_size(each * self._ranks)} have no "
                f"room in the host's {readable_size(present)}, of which {readable_size(free)} are free; offload less, "
                "or use more GPUs (--tp)"
            )
        copied = self._copied_params()
        self._copied, self._read = (self._take(sizes, names) for names in (copied, made.params - copied))
        for home in self._read.values():
            home.seen_at = self._bus.mapped(home.buffer)
        if self._copied:
            self._make_ring(made)
        else:
            self._measure()

    def _copied_params(self) -> frozenset[str]:
        """With uva the bus would rest while layers on the device are computed: meanwhile the first matrices of the next
        one come. Of a single layer they would stay for good."""
        made = self.plan_made
        if self._wanted.mode == "prefetch":
            return made.params
        return made.params & _ATTENTION if len(made.layers) > 1 else frozenset()

    def _take(self, sizes: Sequence[Mapping[str, int]], names: Collection[str]) -> dict[int, _Layer]:
        """Memory for these matrices of the layers that have any."""
        found = {}
        for number in self.plan_made.layers:
            size = sum(size for name, size in sizes[number].items() if name in names)
            if size:  # experts have two matrices
                found[number] = _Layer(self._bus.buffer(size + 6 * _ALIGNMENT))
        return found

    @property
    def copies_all(self) -> bool:
        """Whether nothing is read over the bus, so that steps can be computed without it (:meth:`Ring.still`)."""
        return not self._read

    @property
    def bus_ms(self) -> float:
        """Of a step, while nothing else crosses the bus."""
        read = sum(home.loaded_bytes for home in self._read.values())
        ms = read / self.read_rate * 1e3 if read else 0.0
        return ms if self.ring is None else ms + self.ring.step_bytes / self.copy_rate * 1e3

    def _measure(self) -> None:
        """How fast one copy, or one kernel that reads, is while nothing else crosses the bus. The ring begins anew."""
        if self._read:
            self.read_rate = self._bus.read_rate(_largest(self._read).seen_at)
        if self._copied:
            self.copy_rate = self._bus.copy_rate(_largest(self._copied).bytes, 0)
        if self.ring is not None:
            self.ring.begin()

    def _make_ring(self, made: Plan) -> None:
        homes = list(self._copied.values())
        size = len(_largest(self._copied).bytes)
        slots = [self._bus.add_slot(size)]
        self._measure()
        count = 1
        if not self._read:
            device_rate = self._bus.read_rate(slots[0])
            copy, own = size / self.copy_rate * 1e3, size / device_rate * 1e3
            between = made.device_bytes / len(homes) / device_rate * 1e3
            # a step of few rows, and one that computes for as long as it copies
            count = choose_slots(len(homes), (Times(copy, own, between), Times(copy, copy, between)))
            slots += [self._bus.add_slot(size) for _ in range(1, count)]
        for nth, home in enumerate(homes):
            home.seen_at = slots[nth % count]
        self.ring = Ring(self._bus, [home.bytes for home in homes], count)

    def home(self, layer: int, matrix: str) -> Home | None:
        if matrix not in self.plan_made.params:
            return None
        return (self._copied if matrix in self._copied_params() else self._read).get(layer)

    def reads_bus(self, tensor: Tensor) -> bool:
        """Whether kernels that read it read the host's memory."""
        starts = [(home.seen_at.data_ptr(), len(home.bytes)) for home in self._read.values()]
        return any(start <= tensor.data_ptr() < start + size for start, size in starts)

    def attach(self, layers: Sequence[DecoderLayer]) -> None:
        """When all is loaded: from now on layers wait for what is brought to them. Raises PDServeError."""
        loaded = sum(home.loaded_bytes for home in self.homes)
        if loaded != self.plan_made.host_bytes:
            raise PDServeError(
                f"{loaded} bytes of weights were loaded to the host, {self.plan_made.host_bytes} planned"
            )
        if self.ring is None:
            return
        # with uva a slot is left with the layer: until then other matrices need the bus
        params = self._copied_params()
        attention, mlp = bool(params & _ATTENTION), bool(self._read or params - _ATTENTION)
        for nth, number in enumerate(self._copied):
            self.ring.surround(nth, layers[number], attention=attention, mlp=mlp)
        self.ring.begin()

    def left_out(self) -> Offload:
        """For a model that is loaded only to be copied over this one: what lies here is not read again."""
        return _LeftOut(self)

    def describe(self, device_bytes: int) -> str:
        """``device_bytes``: of all weights there."""
        made, slots = self.plan_made, ""
        if self.ring is not None:
            number, what = self.ring.num_slots, "that they are brought to"
            if self._read:
                what = f"that {' and '.join(sorted(self._copied_params(), reverse=True))} are brought to"
            slots = f", {readable_size(self.ring.size_bytes)} of it {number} slot{'s' * (number > 1)} {what}"
        return (
            f"weights: {readable_size(made.host_bytes)} in the host's memory ({self._wanted.size} asked for: "
            f"{len(made.layers)} of {self._num_layers} layers), {readable_size(device_bytes)} on the device{slots}"
        )

    def usage(self) -> dict[str, TagUsage]:
        """Of the host's memory, by tag."""
        used, reserved = self.plan_made.host_bytes, sum(home.buffer.size for home in self.homes)
        return {WEIGHTS: TagUsage(used, used, reserved)}

    def compare(self, measured_ms: float, alone_ms: float | None) -> None:
        """Logs what a step of one row takes, and ought to. ``alone_ms``: without copies."""
        self._measure()  # again: what was read when memory was new is up to an eighth too low
        copies_ms = self.bus_ms
        log.info(
            "a step of one token: %.1f ms on the bus (%.1f GB/s)%s; predicted %s%.1f ms, measured %.1f ms",
            copies_ms,
            (self.read_rate or self.copy_rate) / 1e9,
            "" if alone_ms is None else f", {alone_ms:.1f} ms of computing beside it",
            "more than " if self.ring is None else "",
            max(copies_ms, alone_ms or 0.0),
            measured_ms,
        )
        if self.ring is None or alone_ms is None:
            return
        if self.ring.step_bytes == 0:
            log.warning("--weight-offload prefetch of one layer frees nothing: its slot on the device is as large")
        elif copies_ms > alone_ms:
            log.warning(
                "--weight-offload prefetch cannot hide its copies in steps of few tokens: they take %.1f ms, and "
                "computing takes %.1f ms; offload less, or serve larger batches",
                copies_ms, alone_ms,
            )  # fmt: skip

    def close(self) -> None:
        """Nobody computes any more."""
        for home in self.homes:
            home.buffer.close()
        self._copied, self._read = {}, {}
        self._bus.close()

    @property
    def homes(self) -> list[_Layer]:
        return [*self._copied.values(), *self._read.values()]


class _Layer:
    """A layer's matrices, one behind the other: a :class:`pd_serve.models.interface.Home`."""

    def __init__(self, buffer: HostBuffer) -> None:
        self.buffer = buffer
        self.bytes = buffer.tensor()
        self.seen_at = self.bytes  # where the device meets them, at the same offsets
        self.loaded_bytes = 0
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        at, size = -(-self._end // _ALIGNMENT) * _ALIGNMENT, math.prod(shape) * dtype.itemsize
        self._end = at + size
        self.loaded_bytes += size
        return self.bytes[at : at + size].view(dtype).view(shape)

    def seen(self, matrix: Tensor) -> Tensor:
        if not matrix.numel():  # it is missing, which will be said
            return matrix
        at = matrix.data_ptr() - self.bytes.data_ptr()
        return self.seen_at[at : at + matrix.nbytes].view(matrix.dtype).view(matrix.shape)


def _largest(homes: Mapping[int, _Layer]) -> _Layer:
    return max(homes.values(), key=lambda home: len(home.bytes))


class _LeftOut:
    """See :meth:`HostWeights.left_out`. It is a :class:`pd_serve.models.interface.Home` as well."""

    def __init__(self, weights: HostWeights) -> None:
        self._weights = weights

    def plan(self, sizes: Sequence[Mapping[str, int]]) -> None:
        """It is made."""

    def home(self, layer: int, matrix: str) -> Home | None:
        return None if self._weights.home(layer, matrix) is None else self

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def seen(self, matrix: Tensor) -> Tensor:
        return matrix


class Ring:
    """Layers by turns in few slots: the nth of them in slot ``n % num_slots``, always."""

    def __init__(self, bus: Bus, sources: Sequence[Tensor], num_slots: int) -> None:
        """``sources``: bytes of each layer. The device has the slots, each as large as the largest."""
        self.num_slots = num_slots
        self.copied_bytes = 0
        self._bus = bus
        self._sources = sources
        self._holds = [-1] * num_slots  # or will, when the last copy has ended
        self._pieces: Pieces | None = None
        self._still = False

    @property
    def size_bytes(self) -> int:
        return self.num_slots * max(len(source) for source in self._sources)

    @property
    def step_bytes(self) -> int:
        """That each step copies."""
        moving = (len(s) for nth, s in enumerate(self._sources) if self._after(nth) != nth)
        return sum(moving)

    def surround(self, nth: int, layer: DecoderLayer, *, attention: bool, mlp: bool) -> None:
        """Its attention, its MLP, or both wait for the slot and leave it."""

        def enter() -> None:
            self._act(lambda: self.enter(nth))

        def leave() -> None:
            self._act(lambda: self.leave(nth))

        if attention:
            layer.attention = _Surrounded(layer.attention, enter, None if mlp else leave)
        if mlp:
            layer.mlp = _Surrounded(layer.mlp, None if attention else enter, leave)

    def begin(self) -> None:
        """Anew, whatever the slots hold: at the start, and after their memory was given back."""
        self._holds = [-1] * self.num_slots
        for nth in range(self.num_slots):
            self._bus.leave(nth)
            self._fetch(nth)

    def enter(self, nth: int) -> None:
        """Before the nth layer is computed."""
        if self._still:
            return
        slot = nth % self.num_slots
        if self._holds[slot] != nth:  # the step before did not come to its end
            self._bus.leave(slot)
            self._fetch(nth)
        self._bus.wait(slot)

    def leave(self, nth: int) -> None:
        """When the computing of the nth layer is queued."""
        if self._still:
            return
        self._bus.leave(nth % self.num_slots)
        self._fetch(self._after(nth))

    def _after(self, nth: int) -> int:
        return after(nth, len(self._sources), self.num_slots)

    def _fetch(self, nth: int) -> None:
        slot = nth % self.num_slots
        if self._holds[slot] != nth:
            self._holds[slot] = nth
            self._bus.copy(slot, self._sources[nth])
            self.copied_bytes += len(self._sources[nth])

    def _act(self, action: Callable[[], None]) -> None:
        """Now, or whenever what is being recorded comes to this place."""
        if self._pieces is None or not self._pieces.cut(lambda _rows: action()):
            action()

    @contextmanager
    def recording(self, pieces: Pieces) -> Iterator[None]:
        """Layers cut ``pieces`` where they wait and leave."""
        self._pieces = pieces
        try:
            yield
        finally:
            self._pieces = None

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is copied or waited for: steps compute wrong numbers, as fast as they would without."""
        self._still = True
        try:
            yield
        finally:
            self._still = False


class _Surrounded:
    """A part of a layer with what is done before and after it."""

    def __init__(self, part: Any, before: Callable[[], None] | None, after: Callable[[], None] | None) -> None:
        self._part = part
        self._before = before
        self._after = after

    @property
    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = self._part.tensors
        return found

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        if self._before is not None:
            self._before()
        out: Tensor = self._part(*arguments, **named)
        if self._after is not None:
            self._after()
        return out
