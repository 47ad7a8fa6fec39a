"""What a decoder needs of a device. ``compute/cpu`` and ``compute/cuda`` have it; models import neither.

T = rows of a step (tokens), D = head size. Activations have the model's dtype (bfloat16 or float32), norm weights are
float32, and each operation computes in float32. What is overwritten and what comes out is valid until the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Fp8Weight(NamedTuple):
    """A matrix, or one for each expert, of FP8 numbers (e4m3), each to be multiplied with its scale."""

    values: Tensor  # [..., out, in] float8_e4m3fn
    scale: Tensor  # float32, of rows: [..., out], or of blocks of 128 x 128: [..., out / 128, in / 128], rounded up
    blocks: bool
    input_scale: float | None = None  # of inputs that become FP8 too; None: found anew for each row, or 128 of it


class Linear(Protocol):
    """``x @ weight.T + bias``; how the weight lies in memory is the device's."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory; a packed weight has no address that could be asked for."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """``[T, in] -> [T, out]``."""


class Routing(NamedTuple):
    """Which experts a token goes to, from a number for each of them: a softmax over all, and of it the largest."""

    per_token: int
    normalise: bool  # their shares are made to sum to 1


class Experts(Protocol):
    """A mixture of gated MLPs (Shazeer et al., 2017, arXiv:1701.06538)."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""

    def __call__(self, x: Tensor, logits: Tensor, /) -> Tensor:
        """``x [T, hidden]``, ``logits [T, experts]``: the sum of what a token's experts make of it, by their shares."""


class Ranks(Protocol):
    """All ranks of a model under tensor parallelism. Each calls the same layers in the same order; all get the same
    bits.
    """

    def summed(self, linear: Linear, /) -> Linear:
        """The sum over ranks of what each one's layer makes of its own input."""

    def summed_experts(self, experts: Experts, /) -> Experts:
        """The same for a mixture of experts."""

    def gathered(self, linear: Linear, /) -> Linear:
        """All ranks' outputs ``[T, out]`` side by side, by rank: ``[T, ranks * out]``."""


class Upload(Protocol):
    """Brings weights to a device, faster than copies one after another; a device may have none."""

    def copy(self, target: Tensor, source: Tensor, /) -> None:
        """Begins to copy ``source``, on the CPU, to the contiguous ``target`` on the device or a :class:`Home`'s, in
        its dtype.
        """

    def finish(self, progress: Callable[[int, int], None] | None = None, /) -> None:
        """Waits until all targets hold their sources; ``progress`` is told bytes, done and in all."""


class Home(Protocol):
    """Where a layer's matrices lie in the host's memory."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, /) -> Tensor:
        """Memory of the host, contiguous, to load a matrix into."""

    def seen(self, matrix: Tensor, /) -> Tensor:
        """The same matrix, or a view of it with another shape, as the device computes with it."""


class Offload(Protocol):
    """Keeps matrices of some layers in the host's memory."""

    def plan(self, sizes: Sequence[Mapping[str, int]], /) -> None:
        """Bytes of each layer's matrices, by names of :data:`pd_serve.config.LAYER_MATRICES`. Raises PDServeError."""

    def home(self, layer: int, matrix: str, /) -> Home | None:
        """None: it lies on the device."""


class Ops(Protocol):
    """A device's primitives; a module can be one. Rows of inputs may be apart, their elements not."""

    @property
    def offload(self) -> Offload | None:
        """None: all weights lie on the device."""

    @property
    def fp8_weights(self) -> bool:
        """Whether it takes matrices in FP8; else they come dequantised."""

    @property
    def settle(self) -> Callable[[Tensor, Tensor, Tensor], None] | None:
        """Of ``logits [N, vocab]`` float32, ``hidden [N, hidden]`` and ``head [vocab, hidden]``: computes the logits
        again, in place, that rounding may have made equal to the best of their row. None: they stay as they came."""

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None, /) -> Linear:
        """Of ``weight [out, in]``, ``bias [out]``; may keep them or copies."""

    def experts(
        self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str, /
    ) -> Experts:
        """Of ``gate_up [experts, 2 I, hidden]``, in each all rows of gate and then all of up, and
        ``down [experts, hidden, I]``; may keep them or copies. ``activation``: "silu" or "gelu_tanh".
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, /) -> Tensor:
        """RMS norm over the last dimension of ``x [T, D]`` or ``[T, H, D]``: a new, contiguous tensor.

        ``weight`` as applied (Gemma: 1 + w, added at load).
        """

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, /) -> tuple[Tensor, Tensor]:
        """``residual + x``, and its RMS norm: ``(normed, residual)``. Both arguments ``[T, D]`` are overwritten."""

    def gated(self, gate_up: Tensor, activation: str, down: Linear, /) -> Tensor:
        """``down(act(gate) * up)`` of ``gate_up [T, 2 I]``: ``[T, hidden]``. ``activation`` as in :meth:`experts`."""


class HeadTransform(NamedTuple):
    """What happens to a layer's q and k before they meet: a norm over each head (where there is one), then rotation."""

    cos_sin: Tensor  # [max positions, R] float32: cosines, then sines; halves, as GPT-NeoX
    q_norm: Tensor | None = None  # [D]; both norms or none
    k_norm: Tensor | None = None
    eps: float = 0.0
    k_scale: float = 1.0  # where K and V are kept in FP8: what numbers there are to be multiplied with
    v_scale: float = 1.0


class Attention(Protocol):
    """Attention of one step over all that its sequences have seen."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform, /
    ) -> Tensor:
        """Transforms ``q [T, Hq, D]`` and ``k [T, Hkv, D]`` (both may be overwritten), stores k and ``v [T, Hkv, D]``,
        and returns the attention of q, with ``ModelConfig.attention_scale``: ``[T, Hq * D]``.

        The three are views of one buffer: heads and their elements are contiguous within a row, rows are further
        apart. ``positions`` int64 ``[T]``. They are valid during the call only.
        """
