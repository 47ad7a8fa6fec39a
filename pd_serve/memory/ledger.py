"""What an engine's start takes of a GPU's memory, phase by phase, and how much that leaves for KV.

Filled by the engine while it starts: it runs each phase inside :meth:`Ledger.phase` and asks for a :class:`Plan` when
CUDA graphs are captured. Nothing is estimated: a phase took what the driver has less of afterwards. Plain arithmetic
over readings (:class:`pd_serve.memory.gauge.DeviceGauge` makes them); no torch, no driver.

A measurement means nothing where another process takes or returns memory meanwhile. Where the driver tells processes
apart that is seen at once; elsewhere by what our own books and the driver's do not have in common.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pd_serve.errors import ConfigError, PDServeError
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.values import readable_size

LIBRARIES, ACTIVATIONS, GRAPHS = "libraries", "activations", "graphs"  # beside WEIGHTS and KV_CACHE
TOLERANCE_BYTES = 128 << 20  # what other processes may change without being noticed
SPARE_BYTES = 64 << 20  # stays free: the last of a device's memory is not to be had in one piece
_GIB = 1 << 30


class MemoryChanged(PDServeError):
    """Another process took or returned memory of the device while an engine measured its own."""


@dataclass(frozen=True)
class Reading:
    """What the driver says of a device, in bytes. ``others``: of what is not free, what is not this process's."""

    free: int
    total: int
    others: int | None  # None: the driver does not tell

    @property
    def used(self) -> int:
        return self.total - self.free


@dataclass(frozen=True)
class Plan:
    """How much KV there may be. ``phases``: bytes, KV not among them. All utilisations are shares of ``total``."""

    total: int
    utilization: float
    phases: dict[str, int]
    kv_bytes: int
    room: int  # the most bytes of KV that there is memory for

    @property
    def without_graphs(self) -> float:
        """The utilisation that gives the same KV where graphs are not counted."""
        return self.utilization - self.phases.get(GRAPHS, 0) / self.total

    @property
    def as_before(self) -> float | None:
        """The one that gives as much KV as this one does where graphs are not counted; None: there is no room."""
        graphs = self.phases.get(GRAPHS, 0)
        return self.utilization + graphs / self.total if self.kv_bytes + graphs <= self.room else None

    def line(self, device: str) -> str:
        """For the log."""
        names = [name for name in (WEIGHTS, ACTIVATIONS, GRAPHS, LIBRARIES) if name in self.phases]
        names += [name for name in self.phases if name not in names]
        parts = ", ".join(f"{name} {self.phases[name] / _GIB:.2f}" for name in names)
        used = (sum(self.phases.values()) + self.kv_bytes) / _GIB
        line = (
            f"{device}: {used:.2f} of {self.total / _GIB:.2f} GiB (--gpu-memory-utilization {self.utilization:.4g}): "
            f"{parts}, KV {self.kv_bytes / _GIB:.2f} GiB"
        )
        if not self.phases.get(GRAPHS):
            return line
        before = "no utilisation has" if self.as_before is None else f"{self.as_before:.4f} has"
        return (
            f"{line}. Were graphs not counted, {self.without_graphs:.4f} would give the same KV; "
            f"{before} room for the KV that {self.utilization:.4g} would give then"
        )


class Ledger:
    """``read``: asks the driver. ``books``: bytes of device memory that this process knows it holds, to compare with.

    ``before``: a reading from before the process used the device, where there is one: what is used by then is others'.
    Without it, and where the driver does not tell, all that is used counts as ours, so that KV gets too little and
    not too much.
    """

    def __init__(
        self,
        read: Callable[[], Reading],
        *,
        books: Callable[[], int] = lambda: 0,
        before: Reading | None = None,
        tolerance_bytes: int = TOLERANCE_BYTES,
    ) -> None:
        self._read = read
        self._books = books
        self._tolerance = tolerance_bytes
        self._last = before or read()
        self._last_books = books()
        self._others = self._others_at_first = self._last.others or 0
        self._phases = {LIBRARIES: self._last.used - self._others}

    @property
    def phases(self) -> dict[str, int]:
        """Bytes by phase, what was measured last included."""
        return dict(self._phases)

    @contextlib.contextmanager
    def phase(self, name: str, *, booked: bool = False) -> Iterator[None]:
        """What is taken inside, and stays, belongs to ``name``; a name may come again, and what it returns counts too.

        ``booked``: only what ``books`` say; the rest belongs to LIBRARIES. For KV_CACHE: its first touch loads kernels.

        Memory that is taken between phases belongs to LIBRARIES; where the driver does not tell processes apart it
        may only be memory of ``books``. The device must have finished its work at the end. Raises MemoryChanged.

        torch gives back what it has cached when a capture begins. So the largest step runs once before the graphs, to
        load and compile all there is, with the cache emptied inside the phase, and once more after them: ACTIVATIONS
        then is what steps need beside the graphs, and it is there to stay.
        """
        self._book(LIBRARIES, idle=self._last.others is None and name != LIBRARIES)
        yield
        self._book(name, booked=booked)

    def _book(self, name: str, *, idle: bool = False, booked: bool = False) -> None:
        now, books = self._read(), self._books()
        grown = now.used - self._last.used
        known = books - self._last_books
        others = self._others
        if now.others is not None:
            others = now.others
        elif grown < known - self._tolerance or (idle and grown > known + self._tolerance):
            others += grown - known
        changed = others - self._others_at_first
        if abs(changed) > self._tolerance:
            raise MemoryChanged(
                f"other processes {'took' if changed > 0 else 'returned'} {readable_size(abs(changed))} of the GPU's "
                f"memory by the time '{name}' was measured: start again when they are settled, start one engine after "
                f"the other on a GPU, or give --kv-cache-memory"
            )
        own = grown - (others - self._others)
        part = known if booked else own
        self._phases[name] = self._phases.get(name, 0) + part
        self._phases[LIBRARIES] += own - part
        self._others, self._last, self._last_books = others, now, books

    def plan(self, utilization: float, least_bytes: int = 1) -> Plan:
        """KV for this share of the device, by what was taken so far; may be asked at any time between phases.

        Raises ConfigError, with the utilisation to set, where ``least_bytes`` of KV are not left.
        """
        if not 0 < utilization <= 1:
            raise ConfigError(f"--gpu-memory-utilization {utilization:g} is not above 0 and at most 1")
        total, fixed = self._last.total, self._fixed
        phases = {name: size for name, size in self._phases.items() if name != KV_CACHE}
        room = self._last.free + self._phases.get(KV_CACHE, 0) - SPARE_BYTES
        plan = Plan(total, utilization, phases, int(utilization * total) - fixed, room)
        least = math.ceil((fixed + least_bytes) / total * 100) / 100
        most = math.floor((fixed + plan.room) / total * 100) / 100
        taken = ", ".join(f"{name} {readable_size(size)}" for name, size in plan.phases.items())
        others = f"other processes {readable_size(self._others)}"
        if plan.room < least_bytes or (plan.kv_bytes < least_bytes and least > most):
            raise ConfigError(
                f"{readable_size(self._last.free)} of the GPU's {readable_size(total)} are free, too little for "
                f"{readable_size(least_bytes)} of KV, at any --gpu-memory-utilization ({taken}, {others}): "
                f"end what else runs on it, lower --max-model-len, or use more GPUs (--tp)"
            )
        if plan.kv_bytes < least_bytes:
            raise ConfigError(
                f"--gpu-memory-utilization {utilization:g} of the GPU's {readable_size(total)} leaves "
                f"{readable_size(max(0, plan.kv_bytes))} for KV, and {readable_size(least_bytes)} are the least "
                f"({taken}): set --gpu-memory-utilization {least:g}"
            )
        if plan.kv_bytes > plan.room:
            raise ConfigError(
                f"--gpu-memory-utilization {utilization:g} asks for {readable_size(plan.kv_bytes)} of KV, and there is "
                f"memory for {readable_size(max(0, plan.room))} ({taken}, {others}): "
                f"set --gpu-memory-utilization {most:g}"
            )
        return plan

    @property
    def _fixed(self) -> int:
        return sum(size for name, size in self._phases.items() if name != KV_CACHE)

    def unexplained_bytes(self) -> int:
        """What the driver says this process uses now, less what the phases say."""
        now = self._read()
        return now.used - (self._others if now.others is None else now.others) - sum(self._phases.values())
