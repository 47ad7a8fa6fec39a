"""The cumem allocator as torch sees it: a MemPool a tag, whose malloc and free are callbacks into Python.

Owned by the engine, beside the allocator. ``use_memory_pool(tag)`` sends what this thread allocates to the tag's pool;
frees find their way from anywhere. Exceptions never cross into C: a failed allocation is NULL to torch, which raises
its own OutOfMemoryError, and the reason is added to that as a note.

torch calls back with the lock of its allocator held, and a callback needs the interpreter's. A thread that frees CUDA
tensors holds these two the other way round: while a pool is filled, no other thread may free tensors of the device.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pd_serve.memory import alloc_conf
from pd_serve.memory.cumem import CumemAllocator, MemoryAsleep
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)

MALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)

MEASURE_S = 10.0  # asking torch what its pools hold takes milliseconds


class TorchMemory(Protocol):
    """What is needed of torch. :class:`CudaMemory` is it; tests have one without CUDA."""

    def make_pool(self, malloc: int, free: int) -> Any:
        """A pool over two C functions."""

    def use_pool(self, pool: Any) -> AbstractContextManager[None]:
        """What this thread allocates inside comes from the pool."""

    def pool_bytes(self, pool: Any) -> tuple[int, int]:
        """Bytes of the pool's tensors, and of all memory that torch holds for it."""

    def settings(self) -> tuple[str, bool]:
        """The text that the allocator was given last, and whether expandable segments are on."""

    def configure(self, text: str) -> None:
        """Hands the allocator a new text."""


class CudaMemory:
    """torch's CUDA allocator on one device."""

    def __init__(self, device: int) -> None:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        self._torch = torch
        self._device = device

    def make_pool(self, malloc: int, free: int) -> Any:
        allocator = self._torch._C._cuda_customAllocator(malloc, free)
        _keep_forever(allocator)  # a pool calls it while it is being destroyed
        with self._torch.cuda.device(self._device):
            return self._torch.cuda.MemPool(allocator)

    def use_pool(self, pool: Any) -> AbstractContextManager[None]:
        return self._torch.cuda.use_mem_pool(pool, device=self._device)

    def pool_bytes(self, pool: Any) -> tuple[int, int]:
        segments = pool.snapshot()
        return sum(s["allocated_size"] for s in segments), sum(s["total_size"] for s in segments)

    def settings(self) -> tuple[str, bool]:
        settings = self._torch.cuda.memory._snapshot()["allocator_settings"]
        text = next((settings[name] for name in alloc_conf.VARIABLES if name in settings), "")
        return text, bool(settings["expandable_segments"])

    def configure(self, text: str) -> None:
        self._torch._C._accelerator_setAllocatorSettings(text)


class _ExpandableSegments:
    """Off while anyone is inside, whatever they were before; the option is the process's, so there is one of these."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._text = ""  # before the first came in
        self._was_on = False

    @contextlib.contextmanager
    def off(self, torch_memory: TorchMemory) -> Iterator[None]:
        with self._lock:
            text, on = torch_memory.settings()
            if on:
                torch_memory.configure(alloc_conf.with_expandable_segments(text, False))
            if self._depth == 0:
                self._text = text if alloc_conf.has_expandable_segments(text) == on else _with(text, on)
                self._was_on = on
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._restore(torch_memory)

    def _restore(self, torch_memory: TorchMemory) -> None:
        text, on = torch_memory.settings()
        if on == self._was_on:
            return
        # options that were changed meanwhile keep their new values
        same = _with(text, self._was_on) == _with(self._text, self._was_on)
        torch_memory.configure(self._text if same else _with(text, self._was_on))


_with = alloc_conf.with_expandable_segments
_expandable_segments = _ExpandableSegments()


class _Routes(threading.local):
    """The pools that this thread allocates from, a stack a device; the last one counts."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[_Route]] = defaultdict(list)


_routes = _Routes()


class _Route:
    def __init__(self, owner: TorchPools, tag: str, pool: Any) -> None:
        self.owner = owner
        self.tag = tag
        self.pool = pool
        self._context: AbstractContextManager[None] | None = None

    def begin(self) -> None:
        context = self.owner.torch_memory.use_pool(self.pool)
        context.__enter__()
        self._context = context

    def end(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


class _Callbacks:
    """What torch calls, from any thread: it lives as long as the process, since torch may call until then."""

    def __init__(self, allocator: CumemAllocator) -> None:
        self._allocator = allocator
        self.failures = threading.local()
        self._malloc_callback = MALLOC(self._malloc)
        self._free_callback = FREE(self._free)
        _keep_forever(self)

    @property
    def addresses(self) -> tuple[int, int]:
        malloc = ctypes.cast(self._malloc_callback, ctypes.c_void_p).value
        free = ctypes.cast(self._free_callback, ctypes.c_void_p).value
        assert malloc is not None
        assert free is not None
        return malloc, free

    def _malloc(self, size: int, device: int, _stream: int | None) -> int:
        try:
            if device != self._allocator.device:
                raise RuntimeError(f"cuda:{device} asked for memory of cuda:{self._allocator.device}")
            address = self._allocator.malloc(size)
        except BaseException as error:
            # torch frees what it has cached and asks again, so that this need not be the end
            log.debug("%d bytes cannot be allocated: %s", size, error)
            self.failures.last = error
            return 0
        self.failures.last = None
        return address

    def _free(self, address: int | None, _size: int, _device: int, _stream: int | None) -> None:
        try:
            if address:
                self._allocator.free(address)
        except BaseException:
            log.exception("memory of torch at %#x is not freed", address)


class TorchPools:
    """The pools of one allocator. ``torch_memory``: torch's side of them; None: CUDA's."""

    def __init__(self, allocator: CumemAllocator, torch_memory: TorchMemory | None = None) -> None:
        self.torch_memory: TorchMemory = torch_memory or CudaMemory(allocator.device)
        self._allocator = allocator
        self._callbacks = _Callbacks(allocator)
        self._lock = threading.Lock()
        self._pools: dict[str, list[Any]] = defaultdict(list)
        self._idle: dict[str, list[Any]] = defaultdict(list)
        self._cached: dict[str, int] = {}
        self._measured_s = -math.inf
        atexit.register(self.close)

    @contextlib.contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        """torch allocations of this thread inside belong to ``tag``, without expandable segments.

        May be nested, also in contexts of other tags and other allocators; what was before is restored, also when
        the body raises. Raises MemoryAsleep while the tag sleeps.
        """
        if tag in self._allocator.asleep:
            raise MemoryAsleep(f"'{tag}' is asleep: wake it before allocating under it")
        failures = self._callbacks.failures
        failures.last = None
        with (
            _expandable_segments.off(self.torch_memory),
            self._allocator.tagged(tag),
            self._routed(tag),
        ):
            try:
                yield
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if failures.last is not None:
                    error.add_note(f"the allocator of '{tag}': {failures.last}")
                raise

    @contextlib.contextmanager
    def _routed(self, tag: str) -> Iterator[None]:
        """torch serves the pool that was begun first, and refuses to begin one twice: the outer one pauses."""
        stack = _routes.stacks[self._allocator.device]
        outer = stack[-1] if stack else None
        pool = next((route.pool for route in stack if route.owner is self and route.tag == tag), None)
        borrowed = pool is None
        if borrowed:
            pool = self._take(tag)
        route = _Route(self, tag, pool)
        try:
            if outer is not None:
                outer.end()
            stack.append(route)
            try:
                route.begin()
                yield
            finally:
                stack.remove(route)
                try:
                    route.end()
                finally:
                    if outer is not None:
                        outer.begin()
        finally:
            if borrowed:
                self._give(tag, pool)

    def _take(self, tag: str) -> Any:
        """A pool of the tag that no thread is in."""
        with self._lock:
            if self._idle[tag]:
                return self._idle[tag].pop()
        pool = self.torch_memory.make_pool(*self._callbacks.addresses)
        with self._lock:
            self._pools[tag].append(pool)
        return pool

    def _give(self, tag: str, pool: Any) -> None:
        with self._lock:
            self._idle[tag].append(pool)

    def report(self) -> MemoryReport:
        """The allocator's report; what torch holds without using it counts as fragmentation."""
        if time.monotonic() - self._measured_s > MEASURE_S:
            self._measured_s = time.monotonic()
            with self._lock:
                pools = {tag: list(pools) for tag, pools in self._pools.items()}
            for tag, members in pools.items():
                sizes = [self.torch_memory.pool_bytes(pool) for pool in members]
                self._cached[tag] = sum(held - live for live, held in sizes)
        return self._allocator.report(self._cached)

    def close(self) -> None:
        """Gives the pools' memory back to the allocator. Idempotent; called at exit if not before.

        A pool whose tensors still live is left to the end of the process: torch would free them with cudaFree
        (pytorch #146431).
        """
        atexit.unregister(self.close)
        gc.collect()
        with self._lock:
            self._idle.clear()
            pools = [pool for members in self._pools.values() for pool in members]
            self._pools.clear()
        while pools:
            pool = pools.pop()
            if self.torch_memory.pool_bytes(pool)[0]:
                log.debug("a memory pool is not destroyed, because tensors of it still live")
                _keep_forever(pool)
            del pool


def _keep_forever(one: object) -> None:
    """Not even the end of the interpreter destroys it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
