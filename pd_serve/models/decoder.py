"""The decoder: tokens in, hidden states and logits out. One definition for the Llama family and Gemma 3.

Called by an executor. Owns the order of the computation and nothing of its means: a device's primitives and attention
over the paged KV are handed in (:mod:`pd_serve.models.interface`). Rows are tokens; the decoder knows no sequences,
blocks or steps. Must never import transformers or a device.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pd_serve.models.config import ModelConfig
from pd_serve.models.interface import Attention, Ops, Ranks, Upload
from pd_serve.models.weights import ModelWeights, load_weights


class Decoder:
    """A model on one device. Positions are below what the weights were loaded for: kernels do not check."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._ops = ops
        # rounded to the dtype, as the models were trained
        scale = torch.tensor(math.sqrt(config.hidden_size)).to(self.dtype).item()
        self._embedding_scale = scale if config.scale_embeddings else None

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """``tokens``, ``positions``: int64 ``[T]``. Returns ``[T, hidden]`` after the final norm, or only ``rows``."""
        ops, eps, layers = self._ops, self.config.rms_norm_eps, self.weights.layers
        residual = torch.nn.functional.embedding(tokens, self.weights.embedding)
        if self._embedding_scale is not None:
            residual = residual * self._embedding_scale
        x = ops.rms_norm(residual, layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in layers[1:]] + [self.weights.norm]
        for layer, next_norm in zip(layers, next_norms, strict=True):
            wanted = rows if next_norm is self.weights.norm else None  # nothing sees the other rows of the last layer
            x = layer.attention(x, positions, attention, wanted)
            if wanted is not None:
                residual = residual[wanted]
            if layer.post_attention_norm is not None:
                x = ops.rms_norm(x, layer.post_attention_norm, eps)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.mlp(x)
            if layer.post_mlp_norm is not None:
                x = ops.rms_norm(x, layer.post_mlp_norm, eps)
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        return x

    @torch.no_grad()  # not inference_mode: the sampler writes into what comes out, outside of it
    def logits(self, hidden: Tensor) -> Tensor:
        """``[N, hidden]`` -> ``[N, vocab]`` float32, the caller's to write to."""
        logits = self.weights.lm_head(hidden).float()
        if (settle := self._ops.settle) is not None and self.config.tie_word_embeddings:
            settle(logits, hidden, self.weights.embedding)
        if (cap := self.config.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_decoder(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    load_format: str = "safetensors",
    *,
    ops: Ops,
    max_positions: int | None = None,
    device: str = "cpu",
    upload: Upload | None = None,
    ranks: Ranks | None = None,
) -> Decoder:
    """Loads weights (``safetensors``) or makes them up (``dummy``) in ``dtype``, for positions below
    ``max_positions`` (default: as many as the model takes). Raises ``ModelError``.

    ``upload``: how weights come to ``device``; None: by plain copies. ``ranks``: ``config`` is a rank's
    (:meth:`ModelConfig.for_rank`).
    """
    positions = min(max_positions or config.default_model_len, config.max_model_len)
    with torch.inference_mode():
        weights = load_weights(
            directory, config, dtype, load_format, torch.device(device), ops, positions, upload, ranks
        )
        return Decoder(config, weights, ops)
