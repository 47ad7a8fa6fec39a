"""Several router processes on one port: started, started again when one dies, and ended together.

Called by the router's main where ``--workers`` is more than 1. The parent holds every listening socket, one a process
and address (SO_REUSEPORT: the kernel deals connections out), for as long as it lives: connections that come to the
place of a process that died wait for the next one there. It serves nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from pd_serve import config, logs
from pd_serve.config import PREFIX, RouterConfig
from pd_serve.errors import PDServeError
from pd_serve.processes import Child, describe_exit

log = logging.getLogger(__name__)

_MAX_RESTARTS, _WINDOW_S = 5, 60.0  # beyond it the fault is not a chance one
_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)


def run(settings: RouterConfig, listeners: list[list[socket.socket]]) -> int:
    """``listeners``: of each process. Serves until SIGTERM or SIGINT; the exit status. Raises PDServeError."""
    with tempfile.TemporaryDirectory(prefix="pd-serve-") as directory:
        path = Path(directory, "router.json")
        path.touch(mode=0o600)  # it may hold the secret and API keys
        path.write_text(config.to_json("router", settings), encoding="utf-8")
        return asyncio.run(_Workers(path, listeners).run())


class _Workers:
    def __init__(self, path: Path, listeners: list[list[socket.socket]]) -> None:
        self._path = path
        self._listeners = listeners
        self._key = secrets.token_hex(32)
        self._children: dict[int, Child] = {}
        self._ending = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        keepers = [asyncio.create_task(self._keep(index)) for index in range(len(self._listeners))]
        try:
            await asyncio.gather(*keepers)
        finally:
            self._ending.set()
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(
                *keepers, *(child.stop(1.0) for child in self._children.values()), return_exceptions=True
            )
        return 0

    def _signalled(self, number: signal.Signals) -> None:
        """Each process drains, or with the second signal ends, by itself."""
        self._ending.set()
        for child in self._children.values():
            child.send_signal(number)

    def _start(self, index: int) -> Child:
        fds = [listener.fileno() for listener in self._listeners[index]]
        where = [str(self._path), str(index), str(len(self._listeners)), ",".join(map(str, fds))]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        command = [sys.executable, "-m", "pd_serve.router.workers", *where]
        return Child(command, environ=environ, stdin=self._key.encode(), fds=fds)

    async def _keep(self, index: int) -> None:
        """Returns when it has ended as it was told to. Raises PDServeError when it cannot start or dies too often."""
        ends: deque[float] = deque()
        while not self._ending.is_set():
            child = self._children[index] = self._start(index)
            status = await child.wait()
            if self._ending.is_set():
                return
            now_s = time.monotonic()
            while ends and now_s - ends[0] > _WINDOW_S:
                ends.popleft()
            if len(ends) >= _MAX_RESTARTS:
                raise PDServeError(
                    f"router process {index} died {len(ends) + 1} times within a minute, the last time with "
                    f"{describe_exit(status)}: see the log above"
                )
            delay_s = _BACKOFF_S[len(ends)]
            ends.append(now_s)
            log.warning(
                "router process %d ended (%s); starting it again in %g s", index, describe_exit(status), delay_s
            )
            await asyncio.sleep(delay_s)


def main(arguments: list[str]) -> None:
    """One of the processes."""
    from pd_serve.router.main import serve
    from pd_serve.router.siblings import Siblings

    path, index, count, fds = arguments
    settings: RouterConfig = config.load("router", {}, config_file=path, environ={})
    logs.configure(settings.log_level, f"router-{index}", form=settings.log_format, access_log=settings.access_log)
    siblings = Siblings(Path(path).parent, int(index), int(count), bytes.fromhex(sys.stdin.read()))
    serve(settings, [socket.socket(fileno=int(fd)) for fd in fds.split(",")], siblings)


if __name__ == "__main__":
    main(sys.argv[1:])
