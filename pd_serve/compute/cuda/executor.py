"""Computes steps on one GPU, one step ahead of the engine: an :class:`pd_serve.compute.executor.Executor` of depth 1.

Owns the device's memory and the order of a start: weights are loaded, kernels are compiled and timed, the largest step
is run and graphs are captured over a KV pool of a few blocks; what the device then has left is the pool's, at the same
addresses. Nothing is estimated (:mod:`pd_serve.memory.ledger`). Without the cumem allocator the pool cannot grow where
it is: then graphs are captured twice.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from pd_serve.compute.backend import Meet
from pd_serve.compute.cuda import attention
from pd_serve.compute.cuda.bus import CudaBus
from pd_serve.compute.cuda.delivery import Delivery
from pd_serve.compute.cuda.inputs import Inputs
from pd_serve.compute.cuda.offload import HostWeights
from pd_serve.compute.cuda.ops import CudaOps, multiplies_fp8
from pd_serve.compute.cuda.paged import PagedAttention, shapes
from pd_serve.compute.cuda.pieces import piece_sizes
from pd_serve.compute.cuda.ranks import CudaRanks
from pd_serve.compute.cuda.runner import Limits, Runner, ladder
from pd_serve.compute.cuda.sampler import Logprobs
from pd_serve.compute.step import SAMPLING, PromptRows, Sampled, SamplingRow, Step
from pd_serve.errors import ConfigError
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.device_pool import DevicePool
from pd_serve.memory.gauge import DeviceGauge
from pd_serve.memory.ledger import ACTIVATIONS, GRAPHS, LIBRARIES, Ledger
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.plain import PlainDeviceMemory
from pd_serve.memory.region import PoolMemory
from pd_serve.memory.sleep import DeviceMemory
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder
from pd_serve.models.interface import Ops, Ranks
from pd_serve.models.offload import Wanted
from pd_serve.models.weights import DTYPES
from pd_serve.values import readable_size
from pd_serve.wire.link import TokenLogprob
from pd_serve.wire.memory import MemoryReport

log = logging.getLogger(__name__)

_FIRST_BLOCKS = 2  # of a pool before it gets its size: block 0, and one that nobody writes to
_RESIZE_BYTES = 4 << 20  # what a pool may take beyond its blocks
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """``num_blocks``: of each layer group, the null block included; 0: what ``gpu_memory_utilization`` leaves.
    ``dtype``: of activations; empty: the KV cache's.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enforce_eager: bool = False
    num_blocks: int = 0
    gpu_memory_utilization: float = 0.92
    cumem: bool = True
    profile_cuda_graphs: bool = True  # False: the pool gets what graphs will take as well
    device: int = 0
    dtype: str = ""
    pin_memory: bool = True  # the setting
    weight_offload: Wanted | None = None


@dataclass(frozen=True)
class Launched:
    """Results on their way to the host."""

    arrived: torch.cuda.Event
    step: Step
    tokens: Tensor
    logprobs: Logprobs | None
    prompts: list[Logprobs]


class CudaExecutor:
    """See :class:`pd_serve.compute.executor.Executor`. All of a start is done when it is made."""

    depth = 1

    def __init__(
        self,
        config: ModelConfig,
        layout: KVLayout,
        read_weights: Callable[[Ops, str, Ranks | None], Decoder],
        settings: Settings,
        meet: Meet | None = None,
    ) -> None:
        """``read_weights(ops, device, ranks)``: at the start, and after a deep sleep. Raises PDServeError or OSError.

        ``meet``: finds the other ranks, where there are some.
        """
        self._device = torch.device("cuda", settings.device)
        self._config, self._layout, self._settings = config, layout, settings
        self._read_weights = read_weights
        driver = CudaDriver()
        gauge = DeviceGauge(driver, settings.device)
        # what this process used already would count as others'
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        before = None if used else gauge.before_context()
        driver.synchronize(settings.device)
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        # of results; as many as steps are on their way at once
        self._deliveries = deque(Delivery(self._device) for _ in range(self.depth + 1))
        self._pin = should_pin_memory(settings.pin_memory, settings.device)
        self._memory: DeviceMemory | PlainDeviceMemory
        if settings.cumem:
            self._memory = DeviceMemory(settings.device, pin=self._pin)
        else:
            self._memory = PlainDeviceMemory(settings.device)
        self._ledger = None if settings.num_blocks else Ledger(gauge.read, books=self._booked, before=before)
        self._ranks: CudaRanks | None = None
        if meet is not None:
            with self._phase("ranks", LIBRARIES):
                group, rows = meet(self._device), max(settings.max_num_batched_tokens, settings.max_num_seqs)
                dtype = DTYPES[settings.dtype or layout.dtype]  # the cache may be in FP8
                self._ranks = CudaRanks(group, rows, config.hidden_size, dtype)
        self._start()
        gauge.close()

    def _booked(self) -> int:
        """Bytes of the device that this process knows of."""
        return self._memory.outside_torch() + torch.cuda.memory_reserved(self._device)

    def _start(self) -> None:
        dtype = DTYPES[self._settings.dtype or self._layout.dtype]
        if self._layout.dtype not in DTYPES and torch.cuda.get_device_capability(self._device) < (8, 9):
            raise ConfigError(
                "--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later; give "
                "--kv-cache-dtype bfloat16"
            )
        self._offload = self._make_offload()
        ops = CudaOps(fp8_weights=multiplies_fp8(dtype, self._device), offload=self._offload)
        with self._phase("weights", WEIGHTS), self._memory.use_memory_pool(WEIGHTS):
            self._model = self._read_weights(ops, str(self._device), self._ranks)
            if self._offload is not None:
                self._offload.attach(self._model.weights.layers)
        self._shapes = shapes(self._config, self._layout, dtype)
        turn = nullcontext() if self._ranks is None else self._ranks.first_rank_first()
        with self._phase("kernels", LIBRARIES), turn:
            attention.compile_kernels(self._shapes, self._device, log.info)
            ops.choose(dtype, self._device, log.info)
            torch.cuda.empty_cache()
        with self._phase("pool", KV_CACHE, booked=True):
            self._pool = self._make_pool()
        self._make_runner()
        with self._phase("largest step", ACTIVATIONS):
            self._run_largest()
            torch.cuda.empty_cache()
        if self._settings.profile_cuda_graphs:
            self._capture()
        with self._phase("largest step again", ACTIVATIONS):
            self._run_largest()
        if self._ledger is not None:
            self._size_pool(self._ledger)
        if not (self._settings.profile_cuda_graphs or self._settings.enforce_eager):
            self._capture_uncounted()
        if self._offload is not None:
            self._compare(self._offload)

    def _make_offload(self) -> HostWeights | None:
        wanted = self._settings.weight_offload
        if wanted is None:
            return None
        return HostWeights(wanted, CudaBus(self._device, pin=self._pin), ranks=self._config.ranks)

    def _compare(self, offload: HostWeights) -> None:
        """Says what weights in the host's memory are, and what they cost."""
        log.info("%s", offload.describe(self.report().tags[WEIGHTS].bytes))
        alone_ms = None
        if offload.ring is not None and offload.copies_all:
            with offload.ring.still():
                alone_ms = self._step_ms()
        offload.compare(self._step_ms(), alone_ms)

    def _step_ms(self) -> float:
        """Of one token, a few steps after the first."""
        step = self._made_up([1], min(self._layout.block_size, self._settings.max_model_len - 1))
        for steps in (1, _TIMED_STEPS):
            start = time.perf_counter()
            for _ in range(steps):
                self.collect(self.launch(step))
        return (time.perf_counter() - start) / _TIMED_STEPS * 1e3

    def _make_runner(self) -> None:
        """Over the pool."""
        limits = Limits(
            self._settings.max_num_batched_tokens,
            self._settings.max_num_seqs,
            self._layout.blocks_for(self._settings.max_model_len + 1),
        )
        inputs = Inputs(limits.tokens, limits.seqs, len(self._layout.groups), self._device)
        regions = self._pool.reserved_tensors()
        paged = PagedAttention(self._layout, regions, self._shapes, inputs.slots, limits.seqs, limits.blocks)
        ring = None if self._offload is None else self._offload.ring
        self._runner = Runner(self._model, paged, inputs, limits, ring=ring)

    def _capture(self) -> None:
        settings = self._settings
        if settings.enforce_eager:
            return
        sizes, pieces = ladder(settings.max_num_seqs), piece_sizes(settings.max_num_batched_tokens)
        with self._phase("graphs", GRAPHS):
            self._runner.capture(sizes, pieces, lambda size: log.debug("graphs of %d rows", size))

    def _capture_uncounted(self) -> None:
        """Beside a pool that has its size already."""
        with self._phase("emptying torch's cache", ACTIVATIONS):
            torch.cuda.empty_cache()  # a capture does, and would count less for it
        try:
            self._capture()
            with self._phase("largest step once more", ACTIVATIONS):
                self._run_largest()
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"CUDA graphs have no room beside the KV cache at --gpu-memory-utilization "
                f"{self._settings.gpu_memory_utilization:g}: lower it, or leave --no-profile-cuda-graphs out"
            ) from None
        if self._ledger is not None:
            log.warning(
                "--no-profile-cuda-graphs: graphs took %s beyond --gpu-memory-utilization",
                readable_size(self._ledger.phases.get(GRAPHS, 0)),
            )

    @contextmanager
    def _phase(self, what: str, name: str, *, booked: bool = False) -> Iterator[None]:
        """Counted where that decides the pool's size."""
        start = time.perf_counter()
        counted = self._ledger.phase(name, booked=booked) if self._ledger is not None else nullcontext()
        with counted:
            yield
            torch.cuda.synchronize(self._device)
        log.info("%s: %.2f s", what, time.perf_counter() - start)

    def _make_pool(self) -> DevicePool:
        """In its size, if that is given, else of a few blocks, at addresses where it can grow."""
        if self._settings.num_blocks:
            return self._memory.kv_pool(self._layout, self._blocks(self._settings.num_blocks))
        most = torch.cuda.get_device_properties(self._device).total_memory // self._each_bytes
        return self._memory.kv_pool(self._layout, self._blocks(_FIRST_BLOCKS), max_blocks=self._blocks(most))

    @property
    def _each_bytes(self) -> int:
        """Of a block in each group."""
        return sum(self._layout.block_bytes(group) for group in range(len(self._layout.groups)))

    def _size_pool(self, ledger: Ledger) -> None:
        settings, each = self._settings, self._each_bytes
        least = (self._layout.blocks_for(settings.max_model_len + 1) + 1) * each + _RESIZE_BYTES
        plan = ledger.plan(settings.gpu_memory_utilization, least)
        log.info("%s", plan.line(str(self._device)))
        number = (plan.kv_bytes - _RESIZE_BYTES) // each
        blocks = self._blocks(number if self._ranks is None else self._ranks.least(number))
        if settings.cumem:
            with self._phase("KV cache", KV_CACHE, booked=True):
                self._pool.resize(blocks)
            return
        with self._phase("KV cache", KV_CACHE, booked=True):
            self._runner.close()
            del self._runner
            self._pool = self._memory.kv_pool(self._layout, blocks)
        self._make_runner()
        if settings.profile_cuda_graphs:
            self._capture()

    def _blocks(self, number: int) -> tuple[int, ...]:
        return (number,) * len(self._layout.groups)

    def _run_largest(self) -> None:
        """The steps that need most: a chunk of all tokens, once with a prefix; all rows with log-probabilities."""
        settings, block = self._settings, self._layout.block_size
        tokens = min(settings.max_num_batched_tokens, settings.max_model_len)
        rows = min(settings.max_num_seqs, settings.max_num_batched_tokens)
        for step in (
            self._made_up([tokens], 0),
            self._made_up([min(tokens, max(1, settings.max_model_len - block))], block, prompt=True),
            self._made_up([1] * rows, min(block, settings.max_model_len - 1)),
        ):
            self.collect(self.launch(step))

    def _made_up(self, counts: list[int], prefix: int, *, prompt: bool = False) -> Step:
        """A step of so many new tokens a sequence after a prefix, which stores nothing and reads blocks 0."""
        total, seqs, groups = sum(counts), len(counts), len(self._layout.groups)
        lens = np.array(counts, np.int32) + prefix
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        row = SamplingRow(
            seed=1, temperature=1.0, top_p=0.9, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, top_k=0, logprobs=20,
        )  # fmt: skip
        step = Step(
            tokens=np.zeros(total, np.int64),
            positions=np.concatenate([np.arange(prefix, prefix + count) for count in counts]).astype(np.int64),
            query_start=starts,
            seq_lens=lens,
            slots=[np.full(total, -1, np.int64)] * groups,
            block_tables=[np.zeros((seqs, self._layout.blocks_for(int(lens.max()))), np.int32)] * groups,
            logits_rows=starts[1:].astype(np.int64) - 1,
            num_decode=seqs if prefix and max(counts) == 1 else 0,
            sampled_rows=np.arange(seqs, dtype=np.int64),
            sampling=np.array([tuple(row)] * seqs, SAMPLING),
        )
        if prompt:
            step.logits_rows = np.arange(total, dtype=np.int64)
            step.sampled_rows = np.array([total - 1], np.int64)
            step.prompt_rows = [PromptRows(0, np.zeros(max(0, total - 1), np.int32), 20)]
        return step

    def launch(self, step: Step) -> Launched:
        queued = self._runner.queue(step)
        delivery = self._deliveries[0]
        self._deliveries.rotate()
        delivery.begin()
        launched = Launched(
            torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
            step,
            delivery.bring(queued.tokens),
            None if queued.logprobs is None else _to_host(queued.logprobs, delivery),
            [_to_host(values, delivery) for values in queued.prompts],
        )
        delivery.go()
        launched.arrived.record()
        return launched

    def collect(self, launched: Launched) -> Sampled:
        if self._ranks is None:
            launched.arrived.synchronize()
        else:
            self._ranks.group.wait(launched.arrived)
        tokens = launched.tokens.tolist()
        wanted = launched.step.sampling["logprobs"].tolist()
        if launched.logprobs is None:
            own: list[TokenLogprob | None] = [None] * len(tokens)
        else:
            rows = _rows(tokens, launched.logprobs, wanted)
            own = [row if k >= 0 else None for row, k in zip(rows, wanted, strict=True)]
        prompts = [
            _rows(p.targets.tolist(), values, [p.k] * len(p.targets))
            for p, values in zip(launched.step.prompt_rows, launched.prompts, strict=True)
        ]
        return Sampled(tokens, own, prompts)

    def done(self, launched: Launched) -> bool:
        return bool(launched.arrived.query())  # type: ignore[no-untyped-call]

    def memory(self) -> list[PoolMemory]:
        return [self._pool.memory()]

    def load(self) -> None:
        """Done already."""

    def warm_up(self) -> None:
        """Done already."""

    @property
    def num_blocks(self) -> int:
        """Of each layer group."""
        return self._pool.memory().regions[0].num_blocks

    @property
    def asleep(self) -> list[str]:
        return self._memory.asleep

    def sleep(self, level: int) -> None:
        torch.cuda.synchronize(self._device)
        self._memory.sleep(level)
        self._dropped = level == 2

    def wake(self, tags: Collection[str]) -> None:
        asleep = WEIGHTS in self.asleep
        self._memory.wake(tags)
        if asleep and WEIGHTS in tags:
            if self._dropped:
                self._read_again()
            if self._offload is not None and self._offload.ring is not None:
                self._offload.ring.begin()  # its slots slept, too

    def _read_again(self) -> None:
        """Into the tensors of before, whose addresses are in graphs. What is in the host's memory stays as it is."""
        fp8_weights = multiplies_fp8(self._model.dtype, self._device)
        offload = None if self._offload is None else self._offload.left_out()
        fresh = self._read_weights(CudaOps(fp8_weights=fp8_weights, offload=offload), "cpu", self._ranks)
        with torch.inference_mode():
            for ours, theirs in zip(self._model.weights.tensors, fresh.weights.tensors, strict=True):
                if not theirs.is_meta:
                    ours.copy_(theirs)
        torch.cuda.synchronize(self._device)

    def report(self) -> MemoryReport:
        report = self._memory.report()
        return report if self._offload is None else msgspec.structs.replace(report, host=self._offload.usage())

    def close(self) -> None:
        """Gives all memory back: what still had tensors in it would stay taken to the end of the process."""
        torch.cuda.synchronize(self._device)
        self._runner.close()
        del self._runner, self._model
        if self._offload is not None:
            self._offload.close()
        self._memory.close()
        torch.cuda.empty_cache()


def _to_host(values: Logprobs, delivery: Delivery) -> Logprobs:
    return Logprobs(*(delivery.bring(value.contiguous()) for value in values))


def _rows(tokens: list[int], values: Logprobs, numbers: list[int]) -> list[TokenLogprob]:
    """``numbers``: how many of the most likely each row wants."""
    chosen, rank = values.chosen.tolist(), values.rank.tolist()
    tops, top_tokens = values.top.tolist(), values.top_tokens.tolist()
    return [
        TokenLogprob(token, chosen[i], rank[i], list(zip(top_tokens[i][: max(k, 0)], tops[i], strict=False)))
        for i, (token, k) in enumerate(zip(tokens, numbers, strict=True))
    ]
