"""The grammar process as the router and the engine start it: on first use, and again where it died."""

from __future__ import annotations

import socket
import subprocess
import sys


class Process:
    """``sock``: ours of the two ends. Dies with this process, whose end closes then."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            # without a function of ours in the child the start does not copy a large process's page tables
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pd_serve.grammar.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """It is of no use any more."""
        self.sock.close()
        self._process.kill()
        self._process.wait()
