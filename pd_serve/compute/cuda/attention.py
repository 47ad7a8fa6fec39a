"""Attention over the block-major KV pool on a GPU, by FlashInfer's kernels.

Called by the engine, an object for each kind of layer (:class:`AttentionShape`) and each phase: :func:`make_decode`
gives :class:`XqaDecode` where XQA has the shape, else :class:`PlannedDecode`; :func:`make_prefill` is for chunks, and
float32 is for a plain kernel of our own. Owns the choice of kernels, their metadata on the device and when they are
compiled. A layer's K and V are views of the pool (``kv/layout.py``), strided and in place: nothing is copied. They may
be in FP8, to be multiplied with the layer's two scales: XQA rounds queries and weights to FP8 then, other kernels
convert what they read.

A decode step is prepared once and run by each layer, or captured into a CUDA graph for a number of rows and then
prepared for each replay. Block 0 of the pool must hold finite numbers: rows that fill up a graph read it, and so do
tokens before a window, though nothing of it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pd_serve.compute.cuda.delivery import Send, copy_now
from pd_serve.compute.cuda.plain import PlainRows, attend
from pd_serve.compute.cuda.unpack import pages_of, unpack
from pd_serve.models.fp8 import FP8

_XQA_BLOCK_SIZES = (16, 32, 64, 128)
_XQA_FP8_DIMS = (64, 128)
_XQA_MAX_GROUP = 32  # query heads of a KV head
_XQA_SEMAPHORE_BYTES = 8 << 20
_WORKSPACE_BYTES = 256 << 20
_PLAN_BYTES = 8 << 20
_UNPACKED_BYTES = 128 << 20  # 32,768 tokens of an 8B Llama's layer


@dataclass(frozen=True)
class AttentionShape:
    """Layers with this have attention in common. ``window``: a token attends to itself and ``window - 1`` before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    scale: float
    window: int | None = None
    soft_cap: float | None = None  # of scores: cap * tanh(score / cap)
    dtype: torch.dtype = torch.bfloat16
    fp8_kv: bool = False  # the pool is in FP8

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the pool."""
        return FP8 if self.fp8_kv else self.dtype

    @property
    def window_left(self) -> int:
        """As FlashInfer has it: tokens before the own one, -1 without a window."""
        return -1 if self.window is None else self.window - 1


def xqa_has(shape: AttentionShape, device: torch.device) -> bool:
    """Whether XQA computes ``shape`` on ``device``."""
    return (
        torch.cuda.get_device_capability(device)[0] in (9, 10, 12)
        and shape.soft_cap is None
        and shape.dtype in (torch.bfloat16, torch.float16)
        and shape.block_size in _XQA_BLOCK_SIZES
        and shape.head_dim % 16 == 0
        and (shape.head_dim in _XQA_FP8_DIMS if shape.fp8_kv else shape.head_dim <= 256)
        and shape.num_heads // shape.num_kv_heads <= _XQA_MAX_GROUP
    )


def compile_kernels(
    shapes: Iterable[AttentionShape], device: torch.device, progress: Callable[[str], None] | None = None
) -> None:
    """Compiles what FlashInfer does not bring compiled (about a minute with enough cores), once: it keeps it on disk.

    ``progress`` is called with a line to show before that, and not at all if everything is there. Where this was not
    called the first use of a kernel compiles it.
    """
    flash = [shape for shape in shapes if shape.dtype is not torch.float32]
    specs = {spec.name: spec for shape in flash for spec in _specs(shape, device)}
    missing = [spec for spec in specs.values() if not spec.is_compiled]
    if not missing:
        return
    if progress:
        progress(f"compiling {len(missing)} attention kernels, once on this machine (about a minute)")
    with ThreadPoolExecutor(len(missing)) as pool:
        for future in [pool.submit(spec.build_and_load) for spec in missing]:
            future.result()


def _specs(shape: AttentionShape, device: torch.device) -> list[Any]:
    from flashinfer.jit import gen_batch_prefill_module
    from flashinfer.jit.xqa import gen_xqa_module

    t, kept, s = shape.dtype, shape.kv_dtype, shape

    def planned(backend: str, kv_dtype: torch.dtype) -> Any:
        return gen_batch_prefill_module(
            backend,
            t,
            kv_dtype,
            t,
            torch.int32,
            s.head_dim,
            s.head_dim,
            0,
            s.window is not None,
            s.soft_cap is not None,
            False,
        )

    specs = [planned(_prefill_backend(shape, device), t)]
    if xqa_has(shape, device):
        group = s.num_heads // s.num_kv_heads
        specs.append(gen_xqa_module(t, kept, s.block_size, s.head_dim, group, s.window is not None, t, 1))
    if s.fp8_kv or not xqa_has(shape, device):
        specs.append(planned("fa2", kept))
    return specs


def _prefill_backend(shape: AttentionShape, device: torch.device) -> str:
    """FA3 where FlashInfer brings it compiled; with windows, caps or other heads it takes nvcc many minutes."""
    plain = shape.window is None and shape.soft_cap is None and shape.head_dim in (64, 128)
    return "fa3" if plain and torch.cuda.get_device_capability(device)[0] == 9 else "fa2"


class Scales(NamedTuple):
    """What a layer's numbers in FP8 are multiplied with."""

    k: float = 1.0
    v: float = 1.0


UNSCALED = Scales()


class Workspaces:
    """Scratch memory of a device, shared by all that computes attention there, on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.xqa = torch.zeros(_XQA_SEMAPHORE_BYTES + _WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.planned = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    @cached_property
    def unpacked(self) -> Tensor:
        """For K and V of chunks that come out of FP8, of one layer at a time."""
        return torch.empty(_UNPACKED_BYTES, dtype=torch.uint8, device=self._device)


class Decode(Protocol):
    """Attention of sequences with one new token each, whose K and V are in the pool already."""

    def prepare(self, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        """For a step without a graph. ``tables [B, blocks]``, ``lens [B]`` int32: tokens, the new ones included.
        ``send``: what may bring them to the device.
        """

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, scales: Scales = UNSCALED) -> None:
        """``q``, ``out [B, Hq, D]`` contiguous; ``k_cache``, ``v_cache [blocks, Hkv, block_size, D]``, one layer's."""

    def begin_capture(self, sizes: Sequence[int]) -> None:
        """Before the graphs for these numbers of rows are captured."""

    def capture(self, size: int) -> None:
        """Before the graph for ``size`` rows is warmed up and captured: :meth:`run` is then called in it."""

    def replay(self, size: int, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        """Before the graph for ``size`` rows is replayed, with B <= ``size`` sequences, as :meth:`prepare` has them."""


def make_decode(
    shape: AttentionShape, max_batch: int, max_blocks: int, device: torch.device, workspaces: Workspaces
) -> Decode:
    """For up to ``max_batch`` sequences of up to ``max_blocks`` blocks."""
    if shape.dtype is torch.float32:
        return PlainDecode(shape, max_batch, max_blocks, device)
    kind = XqaDecode if xqa_has(shape, device) else PlannedDecode
    return kind(shape, max_batch, max_blocks, device, workspaces)


class _DeviceTables:
    """Tables and lengths on the device, where kernels read them: a graph's replay needs no plan of the host's."""

    def __init__(self, shape: AttentionShape, max_batch: int, max_blocks: int, device: torch.device) -> None:
        self._shape = shape
        self.tables = torch.zeros((max_batch, max_blocks), dtype=torch.int32, device=device)
        self.lens = torch.ones(max_batch, dtype=torch.int32, device=device)
        self._size = 0

    def prepare(self, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        self.replay(len(lens), tables, lens, send)
        self._size = len(lens)

    def begin_capture(self, sizes: Sequence[int]) -> None:
        if max(sizes) > len(self.lens):
            raise ValueError(f"graphs of {max(sizes)} rows, but {len(self.lens)} are the most")

    def capture(self, size: int) -> None:
        self._size = size

    def replay(self, size: int, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        used, blocks = tables.shape
        send(self.tables[:used, :blocks], tables)
        send(self.lens[:used], lens)
        if used < size:
            self.tables[used:size, 0] = 0
            self.lens[used:size] = 1


class XqaDecode(_DeviceTables):
    """By XQA."""

    def __init__(
        self, shape: AttentionShape, max_batch: int, max_blocks: int, device: torch.device, workspaces: Workspaces
    ) -> None:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        super().__init__(shape, max_batch, max_blocks, device)
        self._xqa = xqa_batch_decode_with_kv_cache
        self._workspace = workspaces.xqa

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, scales: Scales = UNSCALED) -> None:
        tables = self.tables[: self._size]
        self._xqa(
            q, (k_cache, v_cache), self._workspace, tables, self.lens[: self._size],
            tables.shape[1] * self._shape.block_size, bmm1_scale=self._shape.scale * scales.k, bmm2_scale=scales.v,
            window_left=self._shape.window_left, out=out, kv_layout="HND", enable_pdl=False,
        )  # fmt: skip


class PlainDecode(_DeviceTables):
    """By the plain kernel, any dtype."""

    def __init__(self, shape: AttentionShape, max_batch: int, max_blocks: int, device: torch.device) -> None:
        super().__init__(shape, max_batch, max_blocks, device)
        self._sequences = torch.arange(max_batch, dtype=torch.int32, device=device)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, scales: Scales = UNSCALED) -> None:
        n = self._size
        rows = PlainRows(self.tables[:n], self._sequences[:n], self.lens[:n])
        attend(self._shape, q, k_cache, v_cache, out, rows, scales)


class PlannedDecode:
    """By FlashInfer's decode wrapper on tensor cores: the host, where ``tables`` and ``lens`` are, plans each step."""

    def __init__(
        self, shape: AttentionShape, max_batch: int, max_blocks: int, device: torch.device, workspaces: Workspaces
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self._wrapper = BatchDecodeWithPagedKVCacheWrapper
        self._shape = shape
        self._device = device
        self._workspace = workspaces.planned
        self._plan_buffer = torch.zeros(_PLAN_BYTES, dtype=torch.uint8, device=device)  # of the plan that is run
        self._max_blocks = max_blocks
        self._indices = torch.zeros(max_batch * max_blocks, dtype=torch.int32, device=device)
        self._graphs: dict[int, Any] = {}
        self._eager = self._make(None)
        self._current = self._eager
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def prepare(self, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        self._current = self._eager
        self._plan(self._eager, tables, lens)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, scales: Scales = UNSCALED) -> None:
        self._current.run(q, (k_cache, v_cache), k_scale=scales.k, v_scale=scales.v, out=out)

    def begin_capture(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            self._graphs[size] = self._make(size)

    def capture(self, size: int) -> None:
        self._current = self._graphs[size]
        # the plan decides how many programs a graph has: it has to be one for long sequences
        lens = torch.full((size,), self._max_blocks * self._shape.block_size, dtype=torch.int32)
        self._plan(self._current, torch.zeros((size, self._max_blocks), dtype=torch.int32), lens)

    def replay(self, size: int, tables: Tensor, lens: Tensor, send: Send = copy_now) -> None:
        missing = size - len(lens)
        if missing:
            tables = torch.cat((tables, tables.new_zeros((missing, tables.shape[1]))))
            lens = torch.cat((lens, lens.new_ones(missing)))
        self._plan(self._graphs[size], tables, lens)

    def _make(self, size: int | None) -> Any:
        buffers: dict[str, Tensor] = {}
        if size is not None:
            buffers = {
                "paged_kv_indptr_buffer": torch.zeros(size + 1, dtype=torch.int32, device=self._device),
                "paged_kv_indices_buffer": self._indices,
                "paged_kv_last_page_len_buffer": torch.ones(size, dtype=torch.int32, device=self._device),
            }
        wrapper = self._wrapper(
            self._workspace, "HND", use_tensor_cores=True, use_cuda_graph=size is not None, backend="fa2",
            **buffers,
        )  # fmt: skip
        wrapper.reset_workspace_buffer(self._workspace, self._plan_buffer)
        return wrapper

    def _plan(self, wrapper: Any, tables: Tensor, lens: Tensor) -> None:
        s = self._shape
        starts, indices, last = _pages(tables, lens, s.block_size)
        self._copied.synchronize()  # the plan before is on its way from pinned memory, which this one overwrites
        wrapper.plan(
            starts, indices, last, s.num_heads, s.num_kv_heads, s.head_dim, s.block_size, window_left=s.window_left,
            logits_soft_cap=s.soft_cap, q_data_type=s.dtype, kv_data_type=s.kv_dtype, sm_scale=s.scale,
        )  # fmt: skip
        self._copied.record()


KeysValues = tuple[Tensor, Tensor]  # [T, Hkv, D] each


class Prefill(Protocol):
    """Attention of chunks of prompts, whose K and V are in the pool already."""

    def prepare(self, query_start: Tensor, lens: Tensor, tables: Tensor, *, pool_only: bool = False) -> None:
        """All int32, on the host: ``query_start [B + 1]``, first rows; ``lens [B]``, tokens, new ones included;
        ``tables [B, blocks]``. ``pool_only``: :meth:`run` gets no K and V but the pool's.
        """

    def run(
        self,
        q: Tensor,
        own: KeysValues | None,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        scales: Scales = UNSCALED,
    ) -> None:
        """``q``, ``out [T, Hq, D]``; ``own``: the chunks' own; the caches as in :class:`Decode`.

        Rows of ``q`` and ``own`` may be apart.
        """


def make_prefill(shape: AttentionShape, device: torch.device, workspaces: Workspaces) -> Prefill:
    """For one kind of layer."""
    if shape.dtype is torch.float32:
        return PlainPrefill(shape, device)
    return FlashPrefill(shape, device, workspaces)


class PlainPrefill:
    """By the plain kernel, any dtype."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._rows: PlainRows | None = None

    def prepare(self, query_start: Tensor, lens: Tensor, tables: Tensor, *, pool_only: bool = False) -> None:
        self._rows = PlainRows.of_chunks(query_start, lens, tables, self._device)

    def run(
        self,
        q: Tensor,
        own: KeysValues | None,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        scales: Scales = UNSCALED,
    ) -> None:
        assert self._rows is not None  # prepared
        attend(self._shape, q, k_cache, v_cache, out, self._rows, scales)


class FlashPrefill:
    """By FlashInfer.

    Chunks without a prefix read their own K and V, where they are given. Others read all from the pool: on an H100 to
    read the chunk's own and the prefix apart and to merge the two is no faster (docs/benchmarks.md). Out of FP8 it is
    unpacked first, where there is room for that.
    """

    def __init__(self, shape: AttentionShape, device: torch.device, workspaces: Workspaces) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

        self._shape = shape
        backend = _prefill_backend(shape, device)
        paged = "fa2" if shape.fp8_kv else backend  # FA3 wants queries in FP8, too
        self._paged = BatchPrefillWithPagedKVCacheWrapper(workspaces.planned, "HND", backend=paged)
        self._ragged = BatchPrefillWithRaggedKVCacheWrapper(workspaces.planned, "NHD", backend=backend)
        self._device = device
        self._own = False
        self._pages: Tensor | None = None  # to be unpacked
        self._unpacked = workspaces.planned.new_empty(0).view(shape.dtype)
        if shape.fp8_kv:
            self._unpacked = workspaces.unpacked.view(shape.dtype)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def prepare(self, query_start: Tensor, lens: Tensor, tables: Tensor, *, pool_only: bool = False) -> None:
        s = self._shape
        common = {
            "causal": True, "sm_scale": s.scale, "window_left": s.window_left, "logits_soft_cap": s.soft_cap,
            "q_data_type": s.dtype,
        }  # fmt: skip
        self._own, self._pages = not pool_only and torch.equal(query_start.diff(), lens), None
        self._copied.synchronize()  # as in PlannedDecode
        if self._own:
            self._plan_ragged(query_start, query_start, common)
        else:
            starts, indices, last = _pages(tables, lens, s.block_size)
            if int(lens.sum()) <= self.unpacks:
                first, pages = pages_of(lens, starts, indices, s.block_size)
                self._pages = pages.to(self._device, non_blocking=True)
                self._plan_ragged(query_start, first, common)
                self._copied.record()
                return
            self._paged.plan(
                query_start, starts, indices, last, s.num_heads, s.num_kv_heads, s.head_dim, s.block_size,
                kv_data_type=s.kv_dtype, **common,
            )  # fmt: skip
        self._copied.record()

    def run(
        self,
        q: Tensor,
        own: KeysValues | None,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        scales: Scales = UNSCALED,
    ) -> None:
        if self._own and own is not None:
            self._ragged.run(q, *own, out=out)
        elif self._pages is not None:
            s = self._shape
            k, v = self._unpacked[: 2 * self._tokens * s.num_kv_heads * s.head_dim].view(
                2, self._tokens, s.num_kv_heads, s.head_dim
            )
            unpack(k_cache, v_cache, self._pages, k, v, scales)
            self._ragged.run(q, k, v, out=out)
        else:
            self._paged.run(q, (k_cache, v_cache), k_scale=scales.k, v_scale=scales.v, out=out)

    @property
    def unpacks(self) -> int:
        """Tokens of a step that there is room for."""
        return self._unpacked.numel() // (2 * self._shape.num_kv_heads * self._shape.head_dim)

    def _plan_ragged(self, query_start: Tensor, first: Tensor, common: dict[str, Any]) -> None:
        s = self._shape
        self._tokens = int(first[-1])
        self._ragged.plan(query_start, first, s.num_heads, s.num_kv_heads, s.head_dim, kv_data_type=s.dtype, **common)


def _pages(tables: Tensor, lens: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's form of block tables: where each sequence's begin, blocks of all, tokens in each last block."""
    counts = (lens + (block_size - 1)) // block_size
    tables = tables[:, : int(counts.max())]
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    inside = torch.arange(tables.shape[1], dtype=torch.int32)[None, :] < counts[:, None]
    return starts, tables[inside], lens - (counts - 1) * block_size
