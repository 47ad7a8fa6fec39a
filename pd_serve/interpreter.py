"""The interpreter's lock (GIL), which an engine's main thread and its transfer thread share.

Beside a GPU the transfer thread spins while bytes move. A spinning thread has the lock whenever the main thread lets go
of it, as each call of the device does, and to get it back takes one of the interpreter's switch intervals: on an H100
a step was launched in 20 ms instead of 1.5 while a prompt of 8,192 tokens arrived. So the main thread says when it is
at work, and the other sleeps between its looks for as long (:mod:`pd_serve.transfer.poller`).
"""

from __future__ import annotations

import sys

SWITCH_S = 0.2e-3  # beside a GPU; CPython's 5 ms are as long as a step


class MainThread:
    """``at_work``: it computes in Python just now, and neither waits for messages nor for its device."""

    at_work = False


main_thread = MainThread()


def switch_often() -> None:
    """Whoever waits for the lock gets it within ``SWITCH_S``."""
    sys.setswitchinterval(SWITCH_S)
