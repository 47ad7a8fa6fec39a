"""What :class:`pd_serve.models.interface.Ops` asks for, on a GPU: the kernels beside this, and linears by timing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pd_serve.compute.cuda import experts, kernels, linears, splitk
from pd_serve.models.interface import Fp8Weight, Routing


class CudaOps:
    """Of one model: it remembers the layers that it made, so that all of them can be timed when all are there."""

    fp8_weights = False

    def __init__(self) -> None:
        self._linears: list[linears.Linear] = []
        self._experts: list[experts.Experts] = []

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> linears.Linear:
        """Of ``weight [out, in]``, contiguous, which it keeps."""
        assert isinstance(weight, Tensor)
        layer = linears.Linear(weight, bias)
        self._linears.append(layer)
        return layer

    def experts(
        self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str
    ) -> experts.Experts:
        """Of contiguous weights, which it keeps."""
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        layer = experts.Experts(gate_up, down, routing, activation)
        self._experts.append(layer)
        return layer

    def choose(self, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None] | None = None) -> None:
        """Each linear and each mixture of experts goes the fastest ways for its shape from now on."""
        chosen = linears.choose([layer.shape for layer in self._linears], dtype, device, progress=progress)
        split = [n for (n, _), timed in chosen.items() if any(isinstance(t.way.tile, splitk.SplitTile) for t in timed)]
        workspace = splitk.Workspace(max(split), device) if split else None
        for layer in self._linears:
            layer.use(chosen[layer.shape], workspace)
        experts.choose(self._experts, progress=progress)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`pd_serve.compute.cuda.kernels.rms_norm`."""
        return kernels.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`pd_serve.compute.cuda.kernels.add_rms_norm`."""
        return kernels.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :func:`pd_serve.compute.cuda.kernels.silu_mul`."""
        return kernels.silu_mul(gate_up)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """See :func:`pd_serve.compute.cuda.kernels.gelu_tanh_mul`."""
        return kernels.gelu_tanh_mul(gate_up)
