"""What :class:`pd_serve.models.interface.Ops` asks for, on a GPU: the kernels beside this, and linears by timing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pd_serve.compute.cuda import activations, experts, kernels, linears, splitk
from pd_serve.compute.cuda.offload import HostWeights
from pd_serve.compute.cuda.ranks import Summed
from pd_serve.models.interface import Fp8Weight, Linear, Offload, Routing


def multiplies_fp8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights in FP8 stay that: with activations in ``dtype``, on GPUs that have instructions for it."""
    return dtype is not torch.float32 and torch.cuda.get_device_capability(device) >= (8, 9)


class CudaOps:
    """Of one model: it remembers the layers that it made, so that all of them can be timed when all are there."""

    settle = None  # which logits they are is known on the way only, and graphs have nothing of that kind

    def __init__(self, *, fp8_weights: bool = False, offload: Offload | None = None) -> None:
        """``fp8_weights``: see :func:`multiplies_fp8`."""
        self.fp8_weights = fp8_weights
        self.offload = offload
        self._linears: list[linears.Linear] = []
        self._experts: list[experts.Experts] = []

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> linears.Linear:
        """Of ``weight [out, in]``, contiguous, which it keeps."""
        layer = linears.Linear(weight, bias)
        self._linears.append(layer)
        return layer

    def experts(
        self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str
    ) -> experts.Experts:
        """Of contiguous weights, which it keeps."""
        layer = experts.Experts(gate_up, down, routing, activation)
        self._experts.append(layer)
        return layer

    def choose(self, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None] | None = None) -> None:
        """Each linear and each mixture of experts goes the fastest ways for its shape from now on."""
        chosen = linears.choose([layer.shape for layer in self._linears], dtype, device, progress=progress)
        split = [
            s.outputs for s, timed in chosen.items() if any(isinstance(t.way.tile, splitk.SplitTile) for t in timed)
        ]
        workspace = splitk.Workspace(max(split), device) if split else None
        for layer in self._linears:
            layer.use(chosen[layer.shape], workspace)
        far = self.offload.reads_bus if isinstance(self.offload, HostWeights) else None
        experts.choose(self._experts, dtype, far=far, progress=progress)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`pd_serve.compute.cuda.kernels.rms_norm`."""
        return kernels.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`pd_serve.compute.cuda.kernels.add_rms_norm`."""
        return kernels.add_rms_norm(x, residual, weight, eps)

    def gated(self, gate_up: Tensor, activation: str, down: Linear) -> Tensor:
        """See :meth:`pd_serve.models.interface.Ops.gated`."""
        if isinstance(down, linears.Linear | Summed) and down.rounds_inputs(len(gate_up)):
            return down.of_gated(gate_up, activations.named(activation))
        return down(kernels.silu_mul(gate_up) if activation == "silu" else kernels.gelu_tanh_mul(gate_up))
