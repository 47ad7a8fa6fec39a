"""A process of a test that is stopped, continued and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

# Imported once, by the process that all others are forked from. What they load themselves: NIXL and UCX, which read
# their environment then.
_IMPORTED = ["tests.transfer.harness", "tests.transfer.nixl_ends", "tests.transfer.ucx_ends"]


def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """Runs ``target(pipe, *arguments)`` in a new process, with this one's environment; returns it and its pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    pipe, child = context.Pipe()
    process = context.Process(target=_run, args=(target, dict(os.environ), child, *arguments), daemon=True)
    process.start()
    child.close()
    return process, pipe


def _run(target: Callable[..., None], environ: dict[str, str], pipe: Connection, *arguments: object) -> None:
    os.environ.clear()
    os.environ.update(environ)
    target(pipe, *arguments)


class Killable:
    process: BaseProcess

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(5)

    def close(self) -> None:
        if self.process.is_alive():
            self.kill()
