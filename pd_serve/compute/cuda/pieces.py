"""A forward pass as CUDA graphs with attention between them, for steps that hold chunks of prompts.

Recorded and replayed by the runner. To launch a pass kernel by kernel takes the host longer than a GPU computes up to
about 800 tokens; what attention does depends on how the step's tokens are dealt among sequences, so it stays outside.
(vLLM calls this piecewise graphs, and splits a compiled model; here the attention that a decoder calls cuts the
recording, so that the decoder knows of nothing.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 1024  # beyond, a GPU takes longer than the host


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that pieces are recorded for, largest first: smaller steps are filled up."""
    most = min(most, MOST_TOKENS)
    sizes = [*range(32, 256, 32), *range(256, 512, 64), *range(512, MOST_TOKENS, 128)]
    return sorted({most, *(size for size in sizes if size < most)}, reverse=True)


class Pieces:
    """For one number of tokens. All memory is the pool's, which other graphs use as well when these do not run."""

    def __init__(self, pool: Any) -> None:
        """``pool``: of ``torch.cuda.graph_pool_handle``."""
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._layers: list[int] = []
        self._result: Tensor | None = None

    def record(self, forward: Callable[[], Tensor]) -> None:
        """Captures what ``forward`` queues on the current stream, which is not the default one, when it comes again."""
        forward()  # compiles kernels, which a capture does not allow
        torch.cuda.synchronize()
        self._begin()
        self._result = forward()
        self._graphs[-1].capture_end()

    def cut(self, layer: int) -> None:
        """By the attention of ``layer``, within ``forward``: here it comes."""
        if self._graphs:
            self._graphs[-1].capture_end()
            self._layers.append(layer)
            self._begin()

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=self._pool)

    def replay(self, attend: Callable[[int], None]) -> Tensor:
        """Calls ``attend`` for each layer; returns what ``forward`` did, at the same address each time."""
        assert self._result is not None  # recorded
        for graph, layer in zip(self._graphs[:-1], self._layers, strict=True):
            graph.replay()
            attend(layer)
        self._graphs[-1].replay()
        return self._result
