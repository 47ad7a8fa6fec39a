"""An engine on this machine's cores (see :class:`pd_serve.compute.backend.Backend`)."""

from __future__ import annotations

from pathlib import Path

import torch

from pd_serve.compute.backend import Meet
from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.executor import LocalExecutor
from pd_serve.compute.cpu.host_copies import HostMover
from pd_serve.compute.cpu.ranks import CpuRanks
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.cpu.sampler import Sampler
from pd_serve.config import EngineConfig
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.pool import HostPool
from pd_serve.memory.region import PoolMemory
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.sizes import Sizes

# A core multiplies 256 rows of bfloat16 as fast, a row, as any number of them.
SATURATING_TOKENS = 256


def make_executor(config: EngineConfig, fit: Sizes, meet: Meet | None) -> LocalExecutor:
    """Its memory is filled with pages by ``warm_up``."""
    ranks = None if meet is None else CpuRanks(meet(torch.device("cpu")))
    pool = HostPool(fit.layout, (fit.num_blocks,) * len(fit.layout.groups))
    runner = Runner(None, fit.model, fit.layout, pool.tensors(), config.threads, config.dtype)

    def read_weights() -> Decoder:
        return load_decoder(
            Path(config.model),
            fit.model,
            config.dtype,
            config.load_format,
            ops=ops,
            max_positions=fit.max_model_len + 1,
            ranks=ranks,
        )

    return LocalExecutor(pool, runner, Sampler(fit.model.vocab_size), read_weights)


def make_mover(layout: KVLayout, pool: PoolMemory, size_bytes: int, directory: str, *, pin_memory: bool) -> HostMover:
    return HostMover(pool, TierMemory(layout, size_bytes, directory))
