"""Jobs beside the transfer thread: mapping and unmapping would hold its pulls up, a silent source all other sources."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(job: Callable[[], T], name: str) -> Future[T]:
    """Runs it on a thread of its own, a daemon: a driver that hangs does not keep the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
