"""How long work on model files (download, conversion) is shown: a bar on a terminal, plain lines elsewhere.

Called by :mod:`pd_serve.models.source` only while it works; writes to standard error, as logs do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 5.0


def say(text: str) -> None:
    """One plain line."""
    sys.stderr.write(f"pd-serve: {text}\n")
    sys.stderr.flush()


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``update(done, total)``; the units are the caller's."""
    if not sys.stderr.isatty():
        yield _lines(text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(text: str) -> Callable[[int, int], None]:
    said = time.monotonic()
    say(f"{text} ...")

    def update(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _LINE_EVERY_S and done < total:
            said = time.monotonic()
            say(f"{text}: {100 * done // total}%")

    return update
