"""An engine on one GPU (see :class:`pd_serve.compute.backend.Backend`)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from pd_serve.compute.backend import Meet
from pd_serve.compute.cuda.executor import CudaExecutor, Settings
from pd_serve.compute.cuda.host_copies import CudaHostMover
from pd_serve.config import EngineConfig
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.pinned import should_pin_memory
from pd_serve.memory.region import PoolMemory
from pd_serve.memory.upload import Upload
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops, Ranks
from pd_serve.models.offload import Wanted
from pd_serve.models.sizes import Sizes

# Up to here a matrix is read from memory for as long as it is multiplied with: 295 rows of bfloat16 on an H100.
SATURATING_TOKENS = 512


def make_executor(config: EngineConfig, fit: Sizes, meet: Meet | None) -> CudaExecutor:
    """All of a start: weights, kernels, graphs, and then the KV cache. A rank has the visible GPU of its number."""

    pin = should_pin_memory(config.pin_memory, fit.model.rank)
    wanted = Wanted(config.weight_offload, config.weight_offload_size, config.weight_offload_params)

    def read_weights(ops: Ops, device: str, ranks: Ranks | None) -> Decoder:
        with Upload(torch.device(device), pin=pin) if device != "cpu" else nullcontext() as upload:
            return load_decoder(
                Path(config.model),
                fit.model,
                config.dtype,
                config.load_format,
                ops=ops,
                max_positions=fit.max_model_len + 1,
                device=device,
                upload=upload,
                ranks=ranks,
            )

    settings = Settings(
        max_num_seqs=config.batch_limit,
        max_num_batched_tokens=config.token_budget,
        max_model_len=fit.max_model_len,
        enforce_eager=config.enforce_eager,
        num_blocks=fit.num_blocks,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cumem=bool(config.enable_cumem_allocator),
        profile_cuda_graphs=config.profile_cuda_graphs,
        device=fit.model.rank,
        dtype=config.dtype,
        pin_memory=config.pin_memory,
        weight_offload=None if config.weight_offload == "off" else wanted,
    )
    return CudaExecutor(fit.model, fit.layout, read_weights, settings, meet)


def make_mover(
    layout: KVLayout, pool: PoolMemory, size_bytes: int, directory: str, *, pin_memory: bool
) -> CudaHostMover:
    """A file is not registered: what the kernel writes to a disk is its own."""
    memory = TierMemory(layout, size_bytes, directory)
    return CudaHostMover(pool, memory, pin=not directory and should_pin_memory(pin_memory, pool.device))
