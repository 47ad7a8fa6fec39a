"""Which of several ways was the fastest on a GPU, for numbers of rows, and where that is kept.

What was measured lies in the cache, in a folder for each kind of GPU with its driver and versions: a start with warm
caches times nothing. Used by linears and by sums over ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pd_serve.paths import cache_directory

log = logging.getLogger(__name__)

_FORMAT = 2
W = TypeVar("W")  # a way to do it; ``str`` of it is what is kept


@dataclass(frozen=True)
class Timed(Generic[W]):
    """What was measured for one number of rows: microseconds of the fastest way, and of the library's."""

    rows: int
    way: W
    us: float
    library_us: float


def by_rows(timed: Sequence[Timed[W]]) -> list[W]:
    """The way for each number of rows from 0 to the most that was timed: that of the next number that was."""
    ways: list[W] = []
    for entry in sorted(timed, key=lambda t: t.rows):
        ways += [entry.way] * (entry.rows + 1 - len(ways))
    return ways


def cache_folder(kind: str, *versions: str) -> Path:
    """For what was timed on GPUs and with versions that are called ``versions``, and with this driver."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        driver = "unknown"
    return cache_directory() / kind / hashlib.sha256("|".join((driver, *versions)).encode()).hexdigest()[:16]


def read(file: Path, ladder: Sequence[int], way: Callable[[int, str], W]) -> tuple[Timed[W], ...] | None:
    """What ``file`` has, if that is for all of ``ladder``. A file that makes no sense is ignored with a warning.

    ``way(rows, text)``: the way that is called ``text``; raises LookupError or ValueError where there is none.
    """
    try:
        text = file.read_text()
    except OSError:
        return None
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            return None
        timed = {
            rows: Timed(rows, way(rows, name), float(us), float(library_us))
            for rows, name, us, library_us in data["timed"]
        }
    except (ValueError, LookupError, TypeError) as error:
        log.warning("%s is damaged (%s): timing this again", file, error)
        return None
    return tuple(timed[rows] for rows in ladder) if timed.keys() >= set(ladder) else None


def write(file: Path, timed: Sequence[Timed[W]]) -> None:
    """Whole or not at all: another process may read, or write the same, meanwhile."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [(t.rows, str(t.way), t.us, t.library_us) for t in timed]
        part.write_text(json.dumps({"format": _FORMAT, "timed": rows}))
        part.replace(file)
    except OSError as error:
        log.warning("cannot keep %s (%s): this will be timed at every start", file, error)
