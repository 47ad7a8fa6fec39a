"""A forward pass as CUDA graphs with what graphs cannot hold between them: most often it is one graph.

Recorded and replayed by the runner. To launch a pass kernel by kernel takes the host longer than a GPU computes up to
about 800 tokens. In steps that hold chunks of prompts attention stays outside: what it does depends on how the step's
tokens are dealt among sequences. So does what brings layers from the host, which goes on when a step has ended. (vLLM
calls this piecewise graphs, and splits a compiled model; here what a decoder calls cuts the recording, so that the
decoder knows of nothing.)
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
    """For one number of rows. All memory is the pool's, which other graphs use as well when these do not run."""

    def __init__(self, pool: Any) -> None:
        """``pool``: of ``torch.cuda.graph_pool_handle``."""
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._between: list[Callable[[int], None]] = []
        self._result: Tensor | None = None

    def record(self, forward: Callable[[], Tensor]) -> None:
        """Captures what ``forward`` queues on the current stream, which is not the default one, when it comes again."""
        forward()  # compiles kernels, which a capture does not allow
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as torch.cuda.graph does: what is cached is not the pool's
        self._begin()
        self._result = forward()
        self._graphs[-1].capture_end()

    def cut(self, between: Callable[[int], None]) -> bool:
        """Within ``forward``: here comes ``between``, which is told the rows of a replay. False: nothing is recorded
        yet."""
        if not self._graphs:
            return False
        self._graphs[-1].capture_end()
        self._between.append(between)
        self._begin()
        return True

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=self._pool)

    def replay(self, rows: int) -> Tensor:
        """Returns what ``forward`` did, at the same address each time. ``rows``: that are somebody's."""
        assert self._result is not None  # recorded
        for graph, between in zip(self._graphs[:-1], self._between, strict=True):
            graph.replay()
            between(rows)
        self._graphs[-1].replay()
        return self._result
