"""How the values of settings are read and written: numbers, sizes, lists, choices, URLs.

Used by :mod:`pd_serve.config` alone. A ``Kind`` accepts text (a flag, a variable) and what YAML makes of
the same text, and raises ``ValueError`` with the words that finish the sentence "<setting> ...".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pd_serve import trust

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}b": 1000**n for n, letter in enumerate("kmgt", 1)}


@dataclass(frozen=True)
class Kind:
    """``shape`` is what --help and the documentation show, e.g. ``auto|float32`` or ``URL,URL,...``."""

    shape: str
    parse: Callable[[object], object]
    is_flag: bool = False
    is_key: bool = False  # given and empty is a mistake, and never the same as not given

    @property
    def is_list(self) -> bool:
        return self.shape.endswith(",...")


def _text(value: object) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"must be text, not {value!r}")
    return str(value).strip()


TEXT = Kind("TEXT", _text)


def _output(value: object) -> str:
    """A file that is written at the end of work that may take minutes: where it cannot be is said before."""
    path = _text(value)
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"must name a file in a directory that exists, not {path}")
    return path


OUTPUT = Kind("FILE", _output)


def _url(value: object) -> str:
    raw = _text(value).rstrip("/")
    if not raw:
        return ""
    try:
        parts = urlsplit(raw)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        valid = valid and raw == f"{parts.scheme}://{parts.netloc}" and re.search(r"[^!-~]|[@\\]", raw) is None
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"must be a URL like http://10.0.0.1:8000, not {raw!r}")
    return raw


URL = Kind("URL", _url)


def _collector(value: object) -> str:
    """A URL with a path, as exporters are given it."""
    raw = _text(value)
    host, _, path = raw.removeprefix("https://").removeprefix("http://").partition("/")
    if raw and not (_url(raw[: raw.index(host) + len(host)]) and path):
        raise ValueError(f"must be the whole URL, like http://collector:4318/v1/traces, not {raw!r}")
    return raw


COLLECTOR = Kind("URL", _collector)


def _endpoint(value: object) -> str:
    """An endpoint's URL as clients are given it, with /v1, or without."""
    return _url(_text(value).rstrip("/").removesuffix("/v1"))


ENDPOINT = Kind("URL", _endpoint)


def _items(value: object) -> list[object]:
    if isinstance(value, list | tuple):
        return list(value)
    return [item for item in (part.strip() for part in _text(value).split(",")) if item]


TEXTS = Kind("TEXT,...", lambda value: tuple(_text(item) for item in _items(value)))


def _origin(value: object) -> str:
    raw = _text(value)
    try:
        return raw if raw in ("*", "null") else _url(raw)
    except ValueError:
        raise ValueError(f"must be * or origins like https://chat.example.org, not {raw!r}") from None


ORIGINS = Kind("ORIGIN,...", lambda value: tuple(_origin(item) for item in _items(value)))


def _keys(value: object) -> tuple[str, ...]:
    if value == "":
        return ()
    keys = tuple(_text(item) for item in (value if isinstance(value, list | tuple) else _text(value).split(",")))
    if not all(trust.usable_key(key) for key in keys):
        raise ValueError("must be keys without spaces, none of them empty")
    return keys


KEYS = Kind("KEY,...", _keys, is_key=True)
SECRET = Kind("TEXT", _text, is_key=True)
URLS = Kind("URL,...", lambda value: tuple(_url(item) for item in _items(value)))


def _list_of_nodes(value: object) -> str:
    raw = _text(value)
    parts = urlsplit(raw)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return raw
    if parts.scheme == "k8s" and parts.netloc and parts.path.strip("/"):
        return raw
    raise ValueError(f"must be file:///PATH or k8s://NAMESPACE/SELECTOR, not {raw!r}")


NODE_LISTS = Kind("LIST,...", lambda value: tuple(_list_of_nodes(item) for item in _node_lists(value)))


def _node_lists(value: object) -> list[object]:
    """A comma within a selector separates labels: what does not begin a list goes on with the one before."""
    found: list[str] = []
    for item in _items(value):
        text = _text(item)
        if "://" in text or not found:
            found.append(text)
        else:
            found[-1] += f",{text}"
    return list(found)


def _cores(value: object) -> tuple[int, ...]:
    cores: list[int] = []
    for item in _items(value):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", _text(item))
        if match is None or (match[2] and int(match[2]) < int(match[1])) or int(match[2] or match[1]) > 65535:
            raise ValueError(f"must be core numbers and ranges like 0-3,8, not {item!r}")
        cores.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(dict.fromkeys(cores))


CORES = Kind("CORES", _cores)


def _flag(value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ValueError(f"must be true or false, not {value!r}") from None


FLAG = Kind("true|false", _flag, is_flag=True)


def integer(low: int, high: int | None = None, *, or_zero: bool = False) -> Kind:
    """Whole numbers from ``low`` to ``high``; with ``or_zero`` also 0, which says that another place decides."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    if or_zero:
        limits += ", or 0"

    def parse(value: object) -> int:
        try:
            number = int(_text(value))
        except ValueError:
            number = min(low, 0) - 1
        if (number < low or (high is not None and number > high)) and not (or_zero and number == 0):
            raise ValueError(f"must be a whole number {limits}, not {value!r}")
        return number

    return Kind("N", parse)


def decimal(low: float) -> Kind:
    """Finite numbers of at least ``low``."""

    def parse(value: object) -> float:
        try:
            number = float(_text(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < low:
            raise ValueError(f"must be a number of at least {low:g}, not {value!r}")
        return number

    return Kind("X", parse)


def choice(*options: str | int) -> Kind:
    """One of ``options``."""
    by_text = {str(option): option for option in options}

    def parse(value: object) -> str | int:
        try:
            return by_text[_text(value).lower()]
        except KeyError:
            raise ValueError(f"must be one of {', '.join(by_text)}, not {value!r}") from None

    return Kind("|".join(by_text), parse)


def _size(value: object) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", _text(value).lower())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"must be a size like 512MiB or 4GiB, not {value!r}")
    return int(float(match[1]) * unit)


SIZE = Kind("SIZE", _size)

SIZES = Kind("SIZE,...", lambda value: tuple(_size(item) for item in _items(value)))


def _choices(options: tuple[str, ...]) -> Callable[[object], tuple[str, ...]]:
    def parse(value: object) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(_text(item).lower() for item in _items(value)))
        for name in names:
            if name not in options:
                raise ValueError(f"must be some of {', '.join(options)}, not {name!r}")
        return names

    return parse


def choices(*options: str) -> Kind:
    """Some of ``options``, separated by commas."""
    return Kind(f"{'|'.join(options)},...", _choices(options))


class Amount(NamedTuple):
    """Of something that has layers: ``unit`` is "bytes", "%" or "layers"."""

    number: float
    unit: str


def amount(text: str) -> Amount:
    """What a text of :data:`AMOUNT` says. Raises ValueError."""
    wanted = "must be a size like 8GiB, a share like 30%, or a number of layers like 12layers, above 0"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|layers?|[a-z]*)", text.lower())
    if match is None:
        raise ValueError(f"{wanted}, not {text!r}")
    unit = "layers" if match[2].startswith("layer") else match[2]
    if unit == "%":
        number = float(match[1])
    elif unit == "layers":
        number = float(match[1]) if "." not in match[1] else 0.0
    else:
        number, unit = float(_size(text)), "bytes"
    if number <= 0 or (unit == "%" and number > 100):
        raise ValueError(f"{wanted}{' and at most 100%' if unit == '%' else ''}, not {text!r}")
    return Amount(number, unit)


def _amount(value: object) -> str:
    text = _text(value)
    if text:
        amount(text)
    return text


AMOUNT = Kind("SIZE|PERCENT|LAYERS", _amount)


def integers(low: int) -> Kind:
    """Whole numbers of at least ``low``, separated by commas."""
    parse = integer(low).parse
    return Kind("N,...", lambda value: tuple(parse(item) for item in _items(value)))


def _ratio(value: object) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        value = ":".join(map(str, value))
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", _text(value))
    if match is None:
        raise ValueError(f"must be two numbers like 2:1, not {value!r}")
    return int(match[1]), int(match[2])


RATIO = Kind("N:N", _ratio)


def render(value: object) -> str:
    """A value as a user would write it. None, "not given", is not written."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def readable_size(size: int) -> str:
    """Bytes for reading, rounded up to three digits or so: ``1.5MiB``. A size that the parser takes, too."""
    for n, letter in reversed(list(enumerate("KMGT", 1))):
        if size >= 1024**n:
            tenths = -(-size * 10 // 1024**n)
            return f"{tenths / 10:g}{letter}iB"
    return f"{size}B"


def render_size(size: int) -> str:
    """Bytes as the largest binary unit that divides them: ``1GiB``."""
    for n, letter in reversed(list(enumerate("KMGT", 1))):
        if size and size % 1024**n == 0:
            return f"{size // 1024**n}{letter}iB"
    return str(size)
