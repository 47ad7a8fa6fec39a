"""One process of ``up``: started from a settings file, its output shown, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from pd_serve.config import CACHE_VARIABLE, PREFIX
from pd_serve.errors import PDServeError
from pd_serve.processes import Child, describe_exit

log = logging.getLogger(__name__)

MAX_RESTARTS = 5  # in RESTART_WINDOW_S; beyond it the fault is not a chance one
RESTART_WINDOW_S = 60.0
_BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_KEPT_LINES = 200
_TAIL_LINES = 30
_ERRORS = re.compile(r' ERROR |"level": "ERROR"')
_ERROR = "pd-serve: "  # what the command line writes before an error
_COLOURS = (36, 33, 32, 35, 34, 31)


class Supervised:
    """While it starts, its output is kept, so that a start is a table and not a wall of text; see ``stream``.

    ``environ``: variables that it gets beside this process's.
    """

    def __init__(
        self, name: str, role: str, url: str, settings_file: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.role = role
        self.url = url
        self.has_served = False  # once it has, its end is no failure to start
        self._command = [sys.executable, "-m", "pd_serve.cli", role, "--config", str(settings_file)]
        self._environ = environ or {}
        self._child: Child | None = None
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial = b""
        self._streaming = False
        self._ending = False
        self._restarts: deque[float] = deque()

    @property
    def child(self) -> Child:
        assert self._child is not None
        return self._child

    @property
    def pid(self) -> int:
        return self.child.pid

    def start(self, *, verbose: bool = False) -> None:
        """Starts it. Its settings are all in its file: variables meant for ``up`` must not reach it."""
        self._streaming = self._streaming or verbose
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name == CACHE_VARIABLE
        }
        self._child = Child(self._command, environ=environ | dict(self._environ), capture=True)
        os.set_blocking(self._child.stdout, False)
        asyncio.get_running_loop().add_reader(self._child.stdout, self._read, self._child.stdout)

    def stream(self, *, everything: bool = False) -> None:
        """From now on its output is shown as it comes; of what came before, warnings or everything."""
        if not self._streaming:
            self._streaming = True
            for line in self._kept:
                if everything or any(level in line for level in (" WARNING ", " ERROR ", " CRITICAL ")):
                    self._show(line)

    def last_words(self, status: int) -> str:
        """Why it ended: its own error line, or its last output where it left none or that line points there."""
        tail = list(self._kept)[-_TAIL_LINES:]
        message = next((line for line in reversed(tail) if line.startswith(_ERROR)), "").removeprefix(_ERROR)
        if message and not message.endswith("above"):
            return message
        return "\n  ".join([message.replace("above", "below") or describe_exit(status), *tail])

    async def keep_running(self) -> None:
        """Starts it again whenever it dies. Raises PDServeError when it cannot start or dies too often."""
        while True:
            status = await self.child.wait()
            self._unread()
            if not self.has_served and status >= 0:  # its own decision; a signal is somebody else's
                raise PDServeError(f"{self.name} did not start: {self.last_words(status)}")
            now_s = time.monotonic()
            while self._restarts and now_s - self._restarts[0] > RESTART_WINDOW_S:
                self._restarts.popleft()
            if len(self._restarts) >= MAX_RESTARTS:
                raise PDServeError(
                    f"{self.name} died {MAX_RESTARTS + 1} times within a minute: {self.last_words(status)}"
                )
            delay_s = _BACKOFF_S[len(self._restarts)]
            self._restarts.append(now_s)
            log.warning("%s ended (%s); starting it again in %g s", self.name, describe_exit(status), delay_s)
            await asyncio.sleep(delay_s)
            self.start()

    async def stop(self, grace_s: float) -> None:
        """Ends it. What it says of its end is not shown, errors apart."""
        if self._child is not None:
            self._ending = True
            await self._child.stop(grace_s)
            self._unread()

    def kill(self) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)

    def _unread(self) -> None:
        self._read(self.child.stdout)
        asyncio.get_running_loop().remove_reader(self.child.stdout)

    def _read(self, descriptor: int) -> None:
        try:
            while chunk := os.read(descriptor, 65536):
                *lines, self._partial = (self._partial + chunk).split(b"\n")
                for line in lines:
                    self._line(line.decode(errors="replace"))
        except BlockingIOError:
            return
        with contextlib.suppress(RuntimeError, ValueError):  # end of file: nobody holds the other end
            asyncio.get_running_loop().remove_reader(descriptor)

    def _line(self, line: str) -> None:
        self._kept.append(line)
        if self._streaming and (not self._ending or _ERRORS.search(line)):
            self._show(line)

    def _show(self, line: str) -> None:
        if line.startswith("{"):  # --log-format json: it names its process, and is to stay what it is
            print(line, file=sys.stderr, flush=True)
            return
        name = f"{self.name:<10}"
        if sys.stderr.isatty():
            name = f"\033[{_COLOURS[sum(self.name.encode()) % len(_COLOURS)]}m{name}\033[0m"
        print(f"{name} {line}", file=sys.stderr, flush=True)
