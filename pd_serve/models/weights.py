"""Loads weights into a decoder's layers: fused, typed, checked.

Called once at start by :func:`pd_serve.models.decoder.load_decoder`. Owns the names of HuggingFace's tensors and
the fusion of q, k, v, of gate, up and of experts. Files are mapped, not read: matrices are packed straight out of the
page cache, and the embedding stays there, shared by the nodes of one machine. Matrices in FP8 stay FP8 on devices that
multiply them, and are dequantised elsewhere. Must never serve a model of which a tensor is missing, unknown or of the
wrong shape.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pd_serve.errors import ModelError
from pd_serve.models import fp8
from pd_serve.models.config import ExpertsConfig, ModelConfig
from pd_serve.models.interface import Fp8Weight, HeadTransform, Home, Linear, Ops, Ranks, Routing, Upload
from pd_serve.models.layers import DecoderLayer, GatedMlp, GroupedQueryAttention, Mlp, SparseMoe
from pd_serve.models.matrices import Stack, stacks
from pd_serve.models.progress import bar
from pd_serve.models.quantization import BLOCK
from pd_serve.models.rope import cos_sin_table
from pd_serve.models.shard import Shard, TensorSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES = {**DTYPES, "float8_e4m3fn": fp8.FP8}
# in some checkpoints, but computed here; and the half of Gemma 3 that sees
_IGNORED_PARTS = ("rotary_emb.", "vision_tower.", "multi_modal_projector.")
_DUMMY_VALUES = 4 << 20
_DUMMY_STD = 0.02
_DUMMY_FP8_STD = 16.0  # of numbers in FP8, before they are multiplied with their scale
_NAMES_SHOWN = 8
_FUSED = "experts."  # and the name of a tensor with all experts' matrices


@dataclass
class ModelWeights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[DecoderLayer]
    norm: Tensor
    lm_head: Linear

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds in memory, each once, packed copies included. The same order for the same model."""
        held = [self.embedding, self.norm, *self.lm_head.tensors]
        for layer in self.layers:
            held += layer.tensors
        return list({id(tensor): tensor for tensor in held}.values())

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    load_format: str,
    device: torch.device,
    ops: Ops,
    positions: int,
    upload: Upload | None,
    ranks: Ranks | None,
) -> ModelWeights:
    """For positions below ``positions``. Raises ``ModelError`` naming missing, unexpected and misshapen tensors."""
    with ExitStack() as stack:
        source: TensorSource = _Dummy(DTYPES[dtype]) if load_format == "dummy" else _Safetensors(directory, stack)
        if ranks is not None:
            source = Shard(source, config)
        weights = _Loader(source, config, DTYPES[dtype], device, ops, positions, upload, ranks).load()
        if upload is not None:
            with bar("loading weights") as update:
                upload.finish(update)
        return weights


class _Loader:
    """Takes tensors from a source, each once, and remembers which."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        positions: int,
        upload: Upload | None,
        ranks: Ranks | None,
    ) -> None:
        self.ranks = ranks
        self.source = source
        self.upload = upload
        self.ops = ops
        self.cos_sin = [cos_sin_table(rope, positions, device) for rope in config.ropes]
        self.config = config
        self.dtype = dtype
        self.device = device
        self.used: set[str] = set()
        self.missing: list[str] = []
        # the text half of a multimodal checkpoint lies deeper
        ends = [name for name in source.names or () if name.endswith("embed_tokens.weight")]
        self.prefix = ends[0].removesuffix("embed_tokens.weight") if ends else "model."

    def load(self) -> ModelWeights:
        c = self.config
        embedding = self._tensor(f"{self.prefix}embed_tokens.weight", (c.vocab_size, c.hidden_size))
        names = [f"{self.prefix}layers.{i}." for i in range(c.num_layers)]
        if self.ops.offload is not None:
            self.ops.offload.plan([self._sizes(i, at) for i, at in enumerate(names)])
        layers = [self._layer(i, at) for i, at in enumerate(names)]
        norm = self._norm(f"{self.prefix}norm", c.hidden_size)
        lm_head = embedding
        head_name = "language_model.lm_head.weight" if self.prefix.startswith("language_model.") else "lm_head.weight"
        if c.tie_word_embeddings:
            self.used.add(head_name)  # some checkpoints hold the tied copy too
        else:
            lm_head = self._tensor(head_name, (c.head_rows, c.hidden_size))
        self._check()
        if len(lm_head) > c.head_rows:  # the embedding, which is whole on every rank
            lm_head = lm_head[c.rank * c.head_rows :][: c.head_rows]
        logits: Linear = self.ops.linear(lm_head)
        if self.ranks is not None and c.head_rows < c.vocab_size:
            logits = self.ranks.gathered(logits)
        return ModelWeights(embedding, layers, norm, logits)

    def _layer(self, number: int, at: str) -> DecoderLayer:
        hidden, sandwich = self.config.hidden_size, self.config.sandwich_norms
        mlp_norm = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        return DecoderLayer(
            input_norm=self._norm(f"{at}input_layernorm", hidden),
            attention=self._attention(number, at),
            post_attention_norm=self._norm(f"{at}post_attention_layernorm", hidden) if sandwich else None,
            mlp_norm=self._norm(f"{at}{mlp_norm}", hidden),
            mlp=self._mlp(number, at),
            post_mlp_norm=self._norm(f"{at}post_feedforward_layernorm", hidden) if sandwich else None,
        )

    def _attention(self, number: int, at: str) -> GroupedQueryAttention:
        c = self.config
        transform = HeadTransform(
            self.cos_sin[c.layer_ropes[number]],
            self._norm(f"{at}self_attn.q_norm", c.head_dim) if c.qk_norm else None,
            self._norm(f"{at}self_attn.k_norm", c.head_dim) if c.qk_norm else None,
            c.rms_norm_eps,
            self._kv_scale(f"{at}self_attn.k_scale", f"{at}self_attn.k_proj.k_scale"),
            self._kv_scale(f"{at}self_attn.v_scale", f"{at}self_attn.v_proj.v_scale"),
        )
        qkv, output = (
            self._linear(number, at, name, bias) for name, bias in (("qkv", c.qkv_bias), ("o", c.output_bias))
        )
        return GroupedQueryAttention(number, qkv, self._summed(output), transform, c.num_heads, c.head_dim)

    def _mlp(self, number: int, at: str) -> Mlp:
        c = self.config
        if c.experts is not None and number in c.experts.layers:
            return self._moe(number, at, c.experts)
        gate_up, down = (self._linear(number, at, name, c.mlp_bias) for name in ("gate_up", "down"))
        return GatedMlp(self.ops, gate_up, self._summed(down), c.activation)

    def _moe(self, number: int, at: str, experts: ExpertsConfig) -> SparseMoe:
        hidden, size, home = self.config.hidden_size, experts.intermediate_size, self._home(number, "experts")
        router = self.ops.linear(self._matrices(Stack([(f"{at}mlp.gate", experts.count)], hidden)))
        if self._are_fused(at):
            gate_up: Tensor | Fp8Weight = self._tensor(
                f"{at}mlp.{_FUSED}gate_up_proj", (experts.count, 2 * size, hidden), home
            )
            down: Tensor | Fp8Weight = self._tensor(f"{at}mlp.{_FUSED}down_proj", (experts.count, hidden, size), home)
        else:
            each = stacks(self.config, number, at)["experts"]
            gate_up, down = (_of_each(self._matrices(stack, home), experts.count) for stack in each)
        routing = Routing(experts.per_token, experts.normalise)
        mixture = self.ops.experts(_seen(gate_up, home), _seen(down, home), routing, self.config.activation)
        return SparseMoe(router, mixture if self.ranks is None else self.ranks.summed_experts(mixture))

    def _are_fused(self, at: str) -> bool:
        """Experts of this layer, as transformers 5 has them in memory, and in some files."""
        return f"{at}mlp.{_FUSED}gate_up_proj" in (self.source.names or ())

    def _summed(self, linear: Linear) -> Linear:
        """A linear layer of which each rank has some columns."""
        return linear if self.ranks is None else self.ranks.summed(linear)

    def _linear(self, number: int, at: str, name: str, has_bias: bool) -> Linear:
        """Of a layer's matrix of this name."""
        (stack,), home = stacks(self.config, number, at)[name], self._home(number, name)
        weight = _seen(self._matrices(stack, home), home)
        bias = self._joined([(f"{part}.bias", (rows,)) for part, rows in stack.parts]) if has_bias else None
        return self.ops.linear(weight, bias)

    def _home(self, number: int, name: str) -> Home | None:
        return None if self.ops.offload is None else self.ops.offload.home(number, name)

    def _sizes(self, number: int, at: str) -> dict[str, int]:
        """Bytes of a layer's matrices, as :meth:`_matrices` has them, by name; scales apart."""
        found = {}
        for name, each in stacks(self.config, number, at).items():
            fused = name == "experts" and self._are_fused(at)
            found[name] = sum(
                stack.rows * stack.columns * (1 if not fused and self._stays_fp8(stack) else self.dtype.itemsize)
                for stack in each
            )
        return found

    def _stays_fp8(self, stack: Stack) -> bool:
        """Where its parts are in FP8, the device multiplies it, and no block of scales has rows of two of them."""
        q = self.config.quantization
        return (
            q is not None
            and self.ops.fp8_weights
            and all(self._is_quantised(name) for name, _ in stack.parts)
            and (not q.blocks or all(rows % BLOCK == 0 for _, rows in stack.parts[:-1]))
        )

    def _matrices(self, stack: Stack, home: Home | None = None) -> Tensor | Fp8Weight:
        """The parts' rows, one after another: in FP8, where that can be."""
        q, parts, columns = self.config.quantization, stack.parts, stack.columns
        if q is None or not self._stays_fp8(stack):
            return self._joined([(f"{name}.weight", (rows, columns)) for name, rows in parts], home)
        found = []
        for name, rows in parts:
            values = self._checked(f"{name}.weight", (rows, columns), in_fp8=True)
            part = None if values is None else self._quantised(name, values)
            if part is not None:
                found.append(part)
        if len(found) < len(parts):
            return torch.empty(0)  # what is missing is named soon
        out = self._empty((stack.rows, columns), fp8.FP8, home)
        at = 0
        for part in found:
            rows = len(part.values)
            self._copy(out[at : at + rows], part.values)
            at += rows
        scale, input_scale = fp8.joined_scale(found)
        return Fp8Weight(out, scale.to(self.device), q.blocks, input_scale)

    def _is_quantised(self, module: str) -> bool:
        q = self.config.quantization
        assert q is not None  # asked for quantised models alone
        return q.covers(module) if self.source.names is None else f"{module}.{q.scale}" in self.source.names

    def _quantised(self, module: str, values: Tensor) -> fp8.Quantised | None:
        """A matrix in FP8 with its scales; None where they are missing."""
        q = self.config.quantization
        if q is None or values.dim() != 2 or values.dtype is not fp8.FP8:
            raise ModelError(
                f"The tensor {module}.weight is {values.dtype}, but config.json has no quantization_config for it: "
                "config.json and the weights are of two different models."
            )
        rows, columns = values.shape
        scale = self._any(f"{module}.{q.scale}", fp8.scale_shape(rows, columns, q.blocks))
        inputs = self._any(f"{module}.input_scale", ()) if q.static_inputs else None
        if scale is None:
            return None
        return fp8.Quantised(
            values,
            fp8.to_scale(f"{module}.{q.scale}", scale, rows, columns, q.blocks),
            None if inputs is None else fp8.to_number(f"{module}.input_scale", inputs),
        )

    def _kv_scale(self, *names: str) -> float:
        """Of K or V in an FP8 cache, from the first of these tensors that there is; 1 where there is none."""
        there = [name for name in names if name in (self.source.names or ())]
        tensor = self._any(there[0], ()) if there else None
        return 1.0 if tensor is None else fp8.to_number(there[0], tensor)

    def _joined(self, parts: Sequence[tuple[str, tuple[int, ...]]], home: Home | None = None) -> Tensor:
        if len(parts) == 1:
            return self._tensor(*parts[0], home)
        rows = sum(shape[0] for _, shape in parts)
        out = self._empty((rows, *parts[0][1][1:]), self.dtype, home)
        at = 0
        for name, shape in parts:
            tensor = self._take(name, shape)
            if tensor is not None:
                self._copy(out[at : at + shape[0]], tensor)
            at += shape[0]
        return out

    def _tensor(self, name: str, shape: tuple[int, ...], home: Home | None = None) -> Tensor:
        tensor = self._take(name, shape)
        return torch.empty(shape, dtype=self.dtype) if tensor is None else self._placed(tensor, home)

    def _placed(self, tensor: Tensor, home: Home | None) -> Tensor:
        """Where it belongs and in the model's dtype: itself, where it is that already."""
        if self.upload is None and home is None:
            return tensor.to(self.device, self.dtype).contiguous()
        out = self._empty(tuple(tensor.shape), self.dtype, home)
        self._copy(out, tensor)
        return out

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, home: Home | None) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device) if home is None else home.empty(shape, dtype)

    def _copy(self, out: Tensor, tensor: Tensor) -> None:
        """Into weights. With an upload they are there when it has finished."""
        if self.upload is None:
            out.copy_(tensor)
        else:
            self.upload.copy(out, tensor)

    def _norm(self, name: str, size: int) -> Tensor:
        """In float32 whatever the model's dtype is: rounding 1 + w would lose what the checkpoint says."""
        tensor = self._take(f"{name}.weight", (size,))
        return torch.empty(0) if tensor is None else tensor.to(self.device, torch.float32) + self.config.norm_offset

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Dequantised; None for a missing tensor, so that all missing ones can be named at once."""
        tensor = self._checked(name, shape)
        if tensor is None or tensor.dtype is not fp8.FP8:
            return tensor
        quantised = self._quantised(name.removesuffix(".weight"), tensor)
        return None if quantised is None else quantised.dequantised(self.dtype)

    def _any(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor | None:
        """None for a missing tensor. ``shape``: of one that has to be made up."""
        self.used.add(name)
        if self.source.names is not None and name not in self.source.names:
            self.missing.append(name)
            return None
        return self.source.get(name, shape, in_fp8=in_fp8)

    def _checked(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor | None:
        tensor = self._any(name, shape, in_fp8=in_fp8)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ModelError(
                f"The tensor {name} has shape {tuple(tensor.shape)}, but config.json asks for {shape}: "
                "config.json and the weights are of two different models."
            )
        return tensor

    def _check(self) -> None:
        left = (self.source.names or set()) - self.used
        unexpected = sorted(name for name in left if not any(part in name for part in _IGNORED_PARTS))
        found = [
            f"{what} {_shown(names)}"
            for what, names in (("lack", self.missing), ("hold the unknown", unexpected))
            if names
        ]
        if found:
            raise ModelError(
                f"The weights {' and '.join(found)}: they do not belong to this {self.config.architecture} config.json."
            )


def _of_each(weight: Tensor | Fp8Weight, count: int) -> Tensor | Fp8Weight:
    """Rows of all experts as a matrix for each."""
    if isinstance(weight, Tensor):
        return weight.view(count, -1, weight.shape[-1])
    values, scale = weight.values, weight.scale
    scale = scale.view(count, -1, scale.shape[-1]) if weight.blocks else scale.view(count, -1)
    return weight._replace(values=values.view(count, -1, values.shape[-1]), scale=scale)


def _seen(weight: Tensor | Fp8Weight, home: Home | None) -> Tensor | Fp8Weight:
    """As the device computes with it."""
    if home is None:
        return weight
    return home.seen(weight) if isinstance(weight, Tensor) else weight._replace(values=home.seen(weight.values))


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


class _Safetensors:
    """``*.safetensors`` of a directory: one file, or shards with an index."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}. Get the file again.") from None
            self._files.update(dict.fromkeys(file.keys(), file))
        self.names: set[str] | None = set(self._files)

    def get(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        if tensor.dtype is not fp8.FP8 and (not tensor.is_floating_point() or tensor.element_size() < 2):
            raise ModelError(f"The tensor {name} is {tensor.dtype}; of small numbers only float8_e4m3fn is supported.")
        return tensor


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}).") from None
        lost = [name for name in names if not (directory / name).exists()]
        if lost:
            raise ModelError(f"{directory} lacks {', '.join(lost)}, which its index names; copy the whole model.")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no *.safetensors; --load-format dummy serves random weights.")
    return files


class _Dummy:
    """Random weights that are the same in every process and on every machine.

    A matrix is a view of a few million values, that have to be made once: its rows overlap, and all differ.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.names: set[str] | None = None
        values = np.random.default_rng(0).standard_normal(_DUMMY_VALUES, dtype=np.float32) * np.float32(_DUMMY_STD)
        self._values = torch.from_numpy(values).to(dtype)
        self._in_fp8 = torch.from_numpy(values * (_DUMMY_FP8_STD / _DUMMY_STD)).to(fp8.FP8)

    def get(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith(("scale", "scale_inv")):
            return torch.full(shape, _DUMMY_STD / _DUMMY_FP8_STD)
        *leading, columns = shape
        rows, values = math.prod(leading), len(self._values) - columns
        step = values // (2 * rows)
        if step < 1:
            raise ModelError(f"The tensor {name} of shape {shape} is too large for dummy weights.")
        at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % (values - step * rows)
        source = self._in_fp8 if in_fp8 else self._values
        return source.as_strided((rows, columns), (step, 1), at).view(shape)
