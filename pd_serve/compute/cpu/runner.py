"""Runs a decoder on steps: arrays in, logits out.

Called by the executor, once a step. Owns the attention over the pool's regions and the number of threads.
Must never look at sequences, requests or sampling parameters: a step says everything.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pd_serve.compute.cpu.attention.paged import PagedAttention
from pd_serve.compute.step import Step
from pd_serve.jit import set_kernel_threads
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder
from pd_serve.models.weights import DTYPES

_WARM_UP_TOKENS = 4


class Runner:
    """``regions``: one uint8 tensor a layer group, ``[num_blocks * block_bytes]``. ``threads``: compute threads.
    ``dtype``: of activations; by default the pool's.

    ``model`` is None while the weights are not in memory; nothing can be computed then.
    """

    def __init__(
        self,
        model: Decoder | None,
        config: ModelConfig,
        layout: KVLayout,
        regions: list[Tensor],
        threads: int,
        dtype: str = "",
    ) -> None:
        torch.set_num_threads(threads)
        if threads > 1:
            set_kernel_threads(threads)
        self.model = model
        self._layout = layout
        self._attention = PagedAttention(
            layout,
            regions,
            config.num_heads,
            config.attention_scale,
            DTYPES[dtype or layout.dtype],
            parallel=threads > 1,
        )

    @torch.inference_mode()
    def execute(self, step: Step) -> Tensor:
        """Writes the step's KV and returns ``[N, vocab]`` float32 logits of its ``logits_rows``."""
        assert self.model is not None, "the weights are asleep"
        self._attention.start(step)
        tokens, positions = torch.from_numpy(step.tokens), torch.from_numpy(step.positions)
        rows = torch.from_numpy(step.logits_rows) if len(step.logits_rows) < step.num_tokens else None
        return self.model.logits(self.model.forward(tokens, positions, self._attention, rows))

    def warm_up(self) -> None:
        """Compiles kernels or takes them from the cache, by a short prompt and one decode into block 0."""
        for tokens, num_decode in ((_WARM_UP_TOKENS, 0), (1, 1)):
            self.execute(self._dummy_step(tokens, num_decode))

    def _dummy_step(self, num_tokens: int, num_decode: int) -> Step:
        groups = range(len(self._layout.groups))
        return Step(
            tokens=np.zeros(num_tokens, np.int64),
            positions=np.arange(num_tokens, dtype=np.int64),
            query_start=np.array([0, num_tokens], np.int32),
            seq_lens=np.array([num_tokens], np.int32),
            slots=[np.arange(num_tokens, dtype=np.int64) for _ in groups],
            block_tables=[np.zeros((1, 1), np.int32) for _ in groups],
            logits_rows=np.array([num_tokens - 1], np.int64),
            num_decode=num_decode,
        )
