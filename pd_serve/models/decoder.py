"""The decoder: tokens in, hidden states and logits out. One definition for the Llama family and Gemma 3.

Called by the engine's model runner. Owns the order of the computation and nothing of its means: compute is
:mod:`pd_serve.compute.cpu.ops`, attention over the paged KV is handed in. Rows of a batch are tokens; the decoder knows
no sequences, blocks or batches. Must never import transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pd_serve.compute.cpu import ops
from pd_serve.models.config import ModelConfig
from pd_serve.models.rope import cos_sin_table
from pd_serve.models.weights import LayerWeights, ModelWeights, load_weights


class Attention(Protocol):
    """Attention of one step over all that its sequences have seen."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores ``k``, ``v [T, Hkv, D]`` and returns the attention of ``q [T, Hq, D]``: ``[T, Hq * D]``.

        Rotated already; ``ModelConfig.attention_scale`` is not applied yet. The three are views of one buffer:
        heads and their elements are contiguous within a row, rows are further apart. Valid during the call only.
        """


class Decoder:
    """A model on one device. Positions are below ``max_positions``, which the caller sees to: kernels do not check."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_positions: int | None = None) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.max_positions = min(max_positions or config.default_model_len, config.max_model_len)
        self._cos_sin = [cos_sin_table(rope, self.max_positions, self.device) for rope in config.ropes]
        self._mul = ops.silu_mul if config.activation == "silu" else ops.gelu_tanh_mul
        # rounded to the dtype, as the models were trained
        scale = torch.tensor(math.sqrt(config.hidden_size)).to(self.dtype).item()
        self._embedding_scale = scale if config.scale_embeddings else None

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """``tokens``, ``positions``: int64 ``[T]``. Returns ``[T, hidden]`` after the final norm, or only ``rows``."""
        eps = self.config.rms_norm_eps
        layers = self.weights.layers
        residual = torch.nn.functional.embedding(tokens, self.weights.embedding)
        if self._embedding_scale is not None:
            residual = residual * self._embedding_scale
        x = ops.rms_norm(residual, layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in layers[1:]] + [self.weights.norm]
        for i, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            x = self._attend(i, layer, x, positions, attention)
            if rows is not None and next_norm is self.weights.norm:  # the last layer: nothing sees the other rows
                x, residual = layer.output(x[rows]), residual[rows]
            else:
                x = layer.output(x)
            if layer.post_attention_norm is not None:
                x = ops.rms_norm(x, layer.post_attention_norm, eps)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(self._mul(layer.gate_up(x)))
            if layer.post_mlp_norm is not None:
                x = ops.rms_norm(x, layer.post_mlp_norm, eps)
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        return x

    @torch.no_grad()  # not inference_mode: the sampler writes into what comes out, outside of it
    def logits(self, hidden: Tensor) -> Tensor:
        """``[N, hidden]`` -> ``[N, vocab]`` float32, the caller's to write to."""
        logits = self.weights.lm_head(hidden).float()
        if (cap := self.config.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _attend(self, i: int, layer: LayerWeights, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        c = self.config
        heads = layer.qkv(x).view(len(x), c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        first_k, first_v = c.num_heads, c.num_heads + c.num_kv_heads
        q, k, v = heads[:, :first_k], heads[:, first_k:first_v], heads[:, first_v:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, c.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, c.rms_norm_eps)
        ops.rope_(q, k, positions, self._cos_sin[c.layer_ropes[i]])
        return attention(i, q, k, v)


def load_decoder(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    load_format: str = "safetensors",
    *,
    max_positions: int | None = None,
    device: str = "cpu",
) -> Decoder:
    """Loads weights (``safetensors``) or makes them up (``dummy``) in ``dtype``. Raises ``ModelError``."""
    with torch.inference_mode():
        weights = load_weights(directory, config, dtype, load_format, torch.device(device))
        return Decoder(config, weights, max_positions)
