"""Fields of a model's JSON files, which people and tools write: each reader says what it takes.

Called by :mod:`pd_serve.models.config` and its neighbours. ``null`` means the same as a field left out. Anything
else that a field cannot be is a ``ModelError`` that names it, never another exception and never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_serve.errors import ModelError

_LARGEST, _HUGE = 2**31 - 1, 1e30


def whole(c: Mapping[str, Any], key: str) -> int:
    """A count: 1 to 2**31 - 1."""
    value = c.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
        raise ModelError(f"config.json: {key} must be a positive whole number, not {_shown(value)}.")
    return value


def number(c: Mapping[str, Any], key: str, default: float, what: str = "") -> float:
    """A finite number above 0. ``what``: of which part of the file it is."""
    value = c.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
        said = f"{what} needs a positive {key}" if what else f"{key} must be a positive number"
        raise ModelError(f"config.json: {said}, not {_shown(value)}.")
    return float(value)


def flag(c: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = c.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, not {_shown(value)}.")
    return value


def mapping(c: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; empty where there is none."""
    value = c.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ModelError(f"config.json: {key} must be an object, not {_shown(value)}.")
    return value


def numbers(c: Mapping[str, Any], key: str, count: int, what: str) -> tuple[float, ...]:
    """``count`` finite numbers above 0."""
    value = c.get(key)
    if not isinstance(value, list) or len(value) != count:
        raise ModelError(f"config.json: {what} needs {key}, a list of {count} numbers.")
    return tuple(number({key: item}, key, 0.0, what) if item is not None else _refuse(key, what) for item in value)


def token_ids(c: Mapping[str, Any], key: str, file: str = "config.json") -> tuple[int, ...]:
    """A token id or a list of them. Old files write -1 for none."""
    value = c.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in found):
        raise ModelError(f"{file}: {key} must be a token id or a list of them, not {_shown(value)}.")
    return tuple(item for item in found if 0 <= item <= _LARGEST)


def _refuse(key: str, what: str) -> float:
    raise ModelError(f"config.json: {what} needs {key} without null.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
