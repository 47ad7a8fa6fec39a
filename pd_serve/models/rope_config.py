"""The rotary embedding that a ``config.json`` asks for, as plain numbers. No torch here.

Called by :mod:`pd_serve.models.config`; :mod:`pd_serve.models.rope` makes the tables. Must never fall back to
unscaled rope: a model served with the wrong rope answers fluently and wrongly, so an unknown kind is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pd_serve.errors import ModelError
from pd_serve.models.fields import flag, number, numbers, whole

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. ``head_dim`` and position counts in elements and tokens."""

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0  # context length before scaling (dynamic, llama3, yarn, longrope)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as the borders of the ramp
    attention_factor: float | None = None  # yarn, longrope: multiplies cosines and sines; None = from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    short_factors: tuple[float, ...] = ()  # longrope: divide the frequencies
    long_factors: tuple[float, ...] = ()  # longrope: in their place, where sequences outgrow the original context
    long: bool = False  # longrope: which of them

    def for_length(self, max_model_len: int) -> RopeConfig:
        """As it is for sequences of up to so many tokens.

        One choice for all of them, as in vLLM (transformers switches with a sequence's length): cached keys stay valid.
        """
        return replace(self, long=True) if self.kind == "longrope" and max_model_len > self.original_positions else self


def parse_rope(
    raw: Mapping[str, Any], theta: float, head_dim: int, max_positions: int, original_positions: int | None = None
) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_scaling`` (before); ``theta`` where it names none.

    ``original_positions``: what ``config.json`` says beside them, if it does.
    """
    kind = raw.get("rope_type") or raw.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    theta = number(raw, "rope_theta", theta)
    if number(raw, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: rotary embeddings of part of a head are not supported.")
    if kind not in SUPPORTED or (kind == "dynamic" and raw.get("alpha") is not None):
        shown = f"{kind} with alpha" if kind == "dynamic" else kind
        raise ModelError(
            f"config.json: rope scaling {shown!r} is not supported; supported are {', '.join(SUPPORTED)}. "
            "Removing rope_scaling serves the model up to its original context length."
        )
    what = f"rope scaling {kind!r}"
    if kind == "default":
        return RopeConfig(head_dim, theta)
    if kind == "linear":
        return RopeConfig(head_dim, theta, kind, _needed(raw, "factor", what))
    if kind == "dynamic":
        if head_dim < 4:
            raise ModelError(f"config.json: {what} needs a head size of at least 4, not {head_dim}.")
        factor = _needed(raw, "factor", what)
        if factor < 1:
            raise ModelError(f"config.json: {what} needs a factor of at least 1, not {factor:g}.")
        return RopeConfig(head_dim, theta, kind, factor, original_positions=max_positions)
    if kind == "llama3":
        return _llama3(raw, theta, head_dim, what)
    original = original_positions or max_positions
    if raw.get("original_max_position_embeddings") is not None and original_positions is None:
        original = whole(raw, "original_max_position_embeddings")
    rope = RopeConfig(
        head_dim,
        theta,
        kind,
        number(raw, "factor", max_positions / original, what),
        original_positions=original,
        attention_factor=_optional(raw, "attention_factor", what),
    )
    if kind == "longrope":
        return replace(
            rope,
            short_factors=numbers(raw, "short_factor", head_dim // 2, what),
            long_factors=numbers(raw, "long_factor", head_dim // 2, what),
        )
    if theta == 1:
        raise ModelError(f"config.json: {what} needs a rope_theta other than 1.")
    return replace(
        rope,
        beta_fast=number(raw, "beta_fast", 32.0, what),
        beta_slow=number(raw, "beta_slow", 1.0, what),
        truncate=flag(raw, "truncate", True),
        mscale=_optional(raw, "mscale", what),
        mscale_all_dim=_optional(raw, "mscale_all_dim", what),
    )


def _llama3(raw: Mapping[str, Any], theta: float, head_dim: int, what: str) -> RopeConfig:
    trained = _needed(raw, "original_max_position_embeddings", what)
    low, high = _needed(raw, "low_freq_factor", what), _needed(raw, "high_freq_factor", what)
    if low >= high:
        raise ModelError(f"config.json: {what} needs a low_freq_factor ({low:g}) below high_freq_factor ({high:g}).")
    factor = _needed(raw, "factor", what)
    return RopeConfig(
        head_dim,
        theta,
        "llama3",
        factor,
        original_positions=int(trained),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def scaled_positions(rope: RopeConfig, max_positions: int) -> int:
    """The longest sequence, as vLLM derives it: some kinds stretch ``max_position_embeddings``, others are in it."""
    if rope.kind in ("linear", "dynamic"):
        return int(max_positions * rope.factor)
    if rope.kind == "yarn":
        return int(rope.original_positions * rope.factor)
    return max_positions


def _needed(raw: Mapping[str, Any], key: str, what: str) -> float:
    if raw.get(key) is None:
        raise ModelError(f"config.json: {what} needs a positive {key}, not None.")
    return number(raw, key, 0.0, what)


def _optional(raw: Mapping[str, Any], key: str, what: str) -> float | None:
    return None if raw.get(key) in (None, 0) else number(raw, key, 0.0, what)
