"""The rotary embedding that a ``config.json`` asks for, as plain numbers. No torch here.

Called by :mod:`pd_serve.models.config`; :mod:`pd_serve.models.rope` makes the tables. Must never fall back to
unscaled rope: a model served with the wrong rope answers fluently and wrongly, so an unknown kind is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_serve.errors import ModelError

SUPPORTED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. ``head_dim`` and position counts in elements and tokens."""

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0  # context length before scaling (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as the borders of the ramp
    attention_factor: float | None = None  # yarn: multiplies cosines and sines; None = from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn


def parse_rope(raw: Mapping[str, Any], theta: float, head_dim: int, max_positions: int) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_scaling`` (before); ``theta`` where it names none."""
    kind = raw.get("rope_type") or raw.get("type") or "default"
    theta = float(raw.get("rope_theta", theta))
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: rotary embeddings of part of a head are not supported.")
    if kind not in SUPPORTED:
        raise ModelError(
            f"config.json: rope scaling {kind!r} is not supported; supported are {', '.join(SUPPORTED)}. "
            "Removing rope_scaling serves the model up to its original context length."
        )
    if kind == "default":
        return RopeConfig(head_dim, theta)
    factor = _number(raw, kind, "factor")
    if kind == "linear":
        return RopeConfig(head_dim, theta, kind, factor)
    if kind == "llama3":
        return RopeConfig(
            head_dim,
            theta,
            kind,
            factor,
            original_positions=int(_number(raw, kind, "original_max_position_embeddings")),
            low_freq_factor=_number(raw, kind, "low_freq_factor"),
            high_freq_factor=_number(raw, kind, "high_freq_factor"),
        )
    return RopeConfig(
        head_dim,
        theta,
        kind,
        factor,
        original_positions=int(raw.get("original_max_position_embeddings") or max_positions),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        truncate=bool(raw.get("truncate", True)),
        attention_factor=raw.get("attention_factor"),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
    )


def _number(raw: Mapping[str, Any], kind: str, key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"config.json: rope scaling {kind!r} needs a positive {key}, not {value!r}.")
    return float(value)
