"""Weights in the host's memory, without a device. No slot is read before its layer is there, or written while it is
read, whatever order copies and computing take; bytes are where they were planned; texts do not change.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pd_serve.compute.cpu import ops as cpu_ops
from pd_serve.compute.cuda.offload import HostWeights, Ring
from pd_serve.errors import ConfigError
from pd_serve.memory.host_buffers import HostBuffer
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Fp8Weight, Offload, Routing
from pd_serve.models.offload import Wanted
from tests.e2e import tiny_model
from tests.e2e.tiny_model import Size
from tests.models.fp8_files import quantise
from tests.models.reference import logits
from tests.models.test_fp8 import plain

TOKENS = torch.arange(3, 40)


class Device:
    """Two streams that run as far as they are told to, computing and copies, with events of each slot both ways."""

    def __init__(self, slots: int) -> None:
        self.content = [-1] * slots
        self.streams: dict[str, list[Callable[[], bool]]] = {"computing": [], "copies": []}
        self._left = [0] * slots  # how often it was, as asked for, and as the device has come to it
        self._has_left = [0] * slots
        self._copied = [0] * slots
        self._has_copied = [0] * slots
        self._copying = [False] * slots

    def copy(self, slot: int, source: Tensor) -> None:
        wanted = self._left[slot]
        self._copied[slot] += 1

        def begin() -> bool:
            if self._has_left[slot] < wanted:
                return False
            self.content[slot] = -1
            return True

        def end() -> bool:
            self.content[slot] = len(source)
            self._has_copied[slot] += 1
            return True

        self.streams["copies"] += [begin, end]

    def wait(self, slot: int) -> None:
        wanted = self._copied[slot]
        self.streams["computing"].append(lambda: self._has_copied[slot] >= wanted)

    def read(self, slot: int, layer: int) -> None:
        def look() -> bool:
            assert self.content[slot] == layer, f"slot {slot} holds {self.content[slot]}, not {layer}"
            return True

        self.streams["computing"] += [look, look]

    def leave(self, slot: int) -> None:
        self._left[slot] += 1
        count = self._left[slot]

        def reach() -> bool:
            self._has_left[slot] = count
            return True

        self.streams["computing"].append(reach)

    def advance(self, name: str) -> bool:
        queue = self.streams[name]
        if not queue or not queue[0]():
            return False
        queue.pop(0)
        return True

    def finish(self) -> None:
        while any([self.advance("computing"), self.advance("copies")]):
            continue
        assert not any(self.streams.values()), "the streams wait for each other"


rings = st.integers(1, 9).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, max(1, layers - 1))))


@settings(max_examples=60, deadline=None)
@given(rings, st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), st.data())
def test_no_slot_is_overwritten_while_it_is_read(
    ring_of: tuple[int, int], steps: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """Steps may end after any layer, or within it: what comes after is computed all the same."""
    layers, slots = ring_of
    device = Device(slots)
    ring = Ring(device, [torch.empty(i + 1, dtype=torch.uint8) for i in range(layers)], slots)  # type: ignore[arg-type]
    ring.begin()
    before = ring.copied_bytes
    for end, within in steps:
        for nth in range(layers):
            ring.enter(nth)
            device.read(nth % slots, nth + 1)
            if within and nth == end:
                break
            ring.leave(nth)
            for name in data.draw(st.lists(st.sampled_from(("computing", "copies")), max_size=8)):
                device.advance(name)
            if nth == end:
                break
    device.finish()
    if all(end >= layers - 1 and not (within and end == layers - 1) for end, within in steps):
        assert ring.copied_bytes - before == len(steps) * ring.step_bytes


class AtCall:
    """A linear layer of the CPU that looks at its weight whenever it is called."""

    def __init__(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def tensors(self) -> list[Tensor]:
        return [*(self.weight[:2] if isinstance(self.weight, Fp8Weight) else [self.weight])]

    def __call__(self, x: Tensor) -> Tensor:
        weight = plain(self.weight) if isinstance(self.weight, Fp8Weight) else self.weight
        return cpu_ops.linear(weight.clone(), self.bias)(x)


class ExpertsAtCall:
    def __init__(self, gate_up: Any, down: Any, routing: Routing, activation: str) -> None:
        self.weights, self.more = (gate_up, down), (routing, activation)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for w in self.weights for t in (w[:2] if isinstance(w, Fp8Weight) else [w])]

    def __call__(self, x: Tensor, choice: Tensor) -> Tensor:
        of_each = [
            torch.stack([plain(w._replace(values=v, scale=s)) for v, s in zip(*w[:2], strict=True)])
            if isinstance(w, Fp8Weight)
            else w.clone()
            for w in self.weights
        ]
        return cpu_ops.experts(*of_each, *self.more)(x, choice)


class Ops:
    """The CPU's, with weights where an offload has them."""

    fp8_weights = True

    def __init__(self, offload: Offload | None) -> None:
        self.offload = offload

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu_ops, name)

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> AtCall:
        return AtCall(weight, bias)

    def experts(self, *arguments: Any) -> ExpertsAtCall:
        return ExpertsAtCall(*arguments)


class Memory:
    """Slots in this machine's memory, to which copies come as late as they may."""

    def __init__(self) -> None:
        self.slots: list[Tensor] = []
        self.buffers: list[HostBuffer] = []
        self._waiting: list[tuple[int, Tensor]] = []

    def buffer(self, size: int) -> HostBuffer:
        self.buffers.append(HostBuffer(size, None))
        return self.buffers[-1]

    def mapped(self, buffer: HostBuffer) -> Tensor:
        return buffer.tensor()

    def add_slot(self, size: int) -> Tensor:
        self.slots.append(torch.zeros(size, dtype=torch.uint8))
        return self.slots[-1]

    @torch.inference_mode()
    def copy(self, slot: int, source: Tensor) -> None:
        self.slots[slot].fill_(0xFF)  # NaN in all formats
        self._waiting.append((slot, source))

    @torch.inference_mode()
    def wait(self, slot: int) -> None:
        while any(slot == waiting for waiting, _ in self._waiting):
            to, source = self._waiting.pop(0)
            self.slots[to][: len(source)] = source

    def leave(self, slot: int) -> None:
        """What was computed has been: there is one thread."""

    def copy_rate(self, source: Tensor, slot: int) -> float:
        return 55e9

    def read_rate(self, seen: Tensor) -> float:
        return 3e12

    def close(self) -> None:
        """Nothing is open."""


def load(directory: Path, wanted: Wanted | None, load_format: str = "safetensors") -> tuple[Decoder, Any, Memory]:
    memory = Memory()
    offload = None if wanted is None else HostWeights(wanted, memory)
    config = ModelConfig.from_directory(directory)
    decoder = load_decoder(directory, config, "float32", load_format, ops=Ops(offload))
    if offload is not None:
        offload.attach(decoder.weights.layers)
    return decoder, offload, memory


DENSE = Size(64, 7, 4, 2, 16, 96, 256)
SPARSE = Size(64, 3, 4, 2, 16, 48, 256, experts=4)


@pytest.mark.parametrize(
    ("model", "mode", "size", "params", "load_format"),
    [
        (DENSE, "uva", "1layers", (), "safetensors"),
        (DENSE, "uva", "5layers", (), "safetensors"),  # what attention multiplies is copied
        (DENSE, "prefetch", "1layers", (), "safetensors"),
        (DENSE, "prefetch", "5layers", (), "safetensors"),  # slots do not divide them
        (DENSE, "prefetch", "100%", (), "dummy"),
        (DENSE, "prefetch", "30%", ("o", "down"), "safetensors"),
        (SPARSE, "prefetch", "100%", ("experts",), "dummy"),
        (SPARSE, "uva", "60%", ("gate_up", "experts", "qkv"), "safetensors"),
    ],
)
def test_texts_are_those_of_a_model_on_the_device(
    model: Size, mode: str, size: str, params: tuple[str, ...], load_format: str, tmp_path: Path
) -> None:
    tiny_model.write(tmp_path, model)
    expected = logits(load(tmp_path, None, load_format)[0], TOKENS)
    decoder, offload, memory = load(tmp_path, Wanted(mode, size, params), load_format)
    for _ in range(2):
        assert torch.equal(logits(decoder, TOKENS), expected)
    held, planned = sum(buffer.size for buffer in memory.buffers), offload.plan_made.host_bytes
    assert planned <= held <= planned + 8192 * len(memory.buffers)
    assert planned >= offload.plan_made.asked_bytes
    if mode == "prefetch":
        assert len(memory.slots) == offload.ring.num_slots <= max(1, len(memory.buffers) - 1)
    usage = offload.usage()["weights"]
    assert (usage.bytes, usage.reserved_bytes) == (planned, held)
    if mode == "uva":  # of one layer nothing is copied: it would stay on the device
        assert len(memory.slots) == int(len(offload.plan_made.layers) > 1)
    said = offload.describe(0)
    assert f"{len(offload.plan_made.layers)} of " in said and size in said
    offload.close()


@pytest.mark.parametrize("form", ["blocks", "compressed-rows"])
def test_matrices_in_fp8_stay_that(form: str, tmp_path: Path) -> None:
    tiny_model.write(tmp_path / "source", Size(128, 3, 4, 2, 16, 256, 256))
    quantise(tmp_path / "source", form, tmp_path / "fp8", tmp_path / "plain")
    whole = load(tmp_path / "fp8", None)[0]
    decoder, offload, _ = load(tmp_path / "fp8", Wanted("prefetch", "100%"))
    expected = logits(whole, TOKENS)
    for _ in range(2):
        assert torch.equal(logits(decoder, TOKENS), expected)
    kinds = [[tensor.dtype for tensor in one.weights.tensors] for one in (decoder, whole)]
    assert kinds[0] == kinds[1] and kinds[0].count(torch.float8_e4m3fn) >= 6
    offload.close()


def test_after_sleep_and_after_a_step_that_failed_texts_are_the_same(tmp_path: Path) -> None:
    tiny_model.write(tmp_path, DENSE)
    expected = logits(load(tmp_path, None)[0], TOKENS)
    decoder, offload, memory = load(tmp_path, Wanted("prefetch", "5layers"))
    ring = offload.ring
    for failed in range(5):
        for nth in range(failed):
            ring.enter(nth)
            ring.leave(nth)
        ring.enter(failed)
        assert torch.equal(logits(decoder, TOKENS), expected)
    for slot in range(len(memory.slots)):  # what slept holds anything
        memory.wait(slot)
        with torch.inference_mode():
            memory.slots[slot].fill_(0xFF)
    ring.begin()
    assert torch.equal(logits(decoder, TOKENS), expected)
    offload.close()


def test_a_second_reading_leaves_out_what_is_in_the_hosts_memory(tmp_path: Path) -> None:
    tiny_model.write(tmp_path, SPARSE)
    decoder, offload, memory = load(tmp_path, Wanted("prefetch", "2layers"))
    config = ModelConfig.from_directory(tmp_path)
    fresh = load_decoder(tmp_path, config, "float32", ops=Ops(offload.left_out()))
    read = {"meta": 0, "cpu": 0}
    for ours, theirs in zip(decoder.weights.tensors, fresh.weights.tensors, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        read[theirs.device.type] += theirs.nbytes
    assert read["meta"] == offload.plan_made.host_bytes
    assert len(memory.buffers) == 2
    offload.close()


def resident_bytes() -> int:
    """Without what the C library keeps of what was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_hosts_memory_is_what_was_asked_for_and_nothing_beside_it(tmp_path: Path) -> None:
    tiny_model.write(tmp_path, Size(1024, 8, 8, 8, 128, 3072, 64))
    config = ModelConfig.from_directory(tmp_path)

    class Only(Ops):
        """Lets go of what lies on the device."""

        def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> AtCall:
            return AtCall(torch.empty(0))

    grown = 0
    for _ in range(2):  # the first one brings libraries
        memory = Memory()
        offload = HostWeights(Wanted("uva", "50%"), memory)
        before = resident_bytes()
        load_decoder(tmp_path, config, "bfloat16", "dummy", ops=Only(offload))
        grown = resident_bytes() - before - sum(slot.nbytes for slot in memory.slots)
        asked = offload.plan_made.asked_bytes
        assert asked == offload.plan_made.host_bytes == sum(home.loaded_bytes for home in offload.homes)
        offload.close()
    assert grown < asked * 1.01 + (8 << 20)


def test_more_than_the_host_has_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    tiny_model.write(tmp_path, DENSE)
    offload = HostWeights(Wanted("uva", "100%"), Memory(), ranks=1 << 30)
    with pytest.raises(ConfigError, match="have no room in the host's"):
        load_decoder(tmp_path, ModelConfig.from_directory(tmp_path), "float32", ops=Ops(offload))
