"""Starting child processes that never outlive their parent, and learning of their end without polling.

Used by ``up`` for the router and the nodes, by a node for its engine, and by an engine for its other ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A child in a session of its own: a terminal's Ctrl-C reaches the parent only, which decides.

    Must be created on the main thread: the kernel ties the child's life to the thread that forked it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        capture: bool = False,
        fds: Collection[int] = (),
    ) -> None:
        """``stdin``: all that the child can read there. ``capture``: its output goes to ``stdout``, else to ours.

        ``fds``: file descriptors that it has, too.
        """
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        self._process = subprocess.Popen(
            arguments,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            start_new_session=True,
            pass_fds=fds,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (forked from a process without other threads that hold locks)
        )
        if stdin is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(stdin)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> int:
        """File descriptor of the captured output."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    async def wait(self) -> int:
        """Waits for its end, without a thread and without polling."""
        if (status := self._process.poll()) is not None:
            return status
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        pidfd = os.pidfd_open(self.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing when it has ended already."""
        self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL after ``grace_s``."""
        self.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            return await self.wait()


def describe_exit(status: int) -> str:
    """``exit status 1``, ``killed by SIGKILL``."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
