"""A timer that a poller can wait for beside its sockets, exact to some microseconds.

A poller knows only whole milliseconds, and a sleep cannot be woken by a message. Python
has timerfd from 3.13 on; before that it is called through ctypes. Used by the transfer thread alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

TFD_NONBLOCK = 0o4000
TFD_CLOEXEC = 0o2000000


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: the interval, unused, and the time from now."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "s", "ns")]


class Timer:
    """Readable once its time has come."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._fd = libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _TimerSpec()

    def fileno(self) -> int:
        return int(self._fd)

    def arm(self, delay_s: float) -> None:
        """Starts anew; what is not in the future is due at once."""
        self._spec.s, nanoseconds = divmod(max(0, int(delay_s * 1e9)), 1_000_000_000)
        self._spec.ns = max(1, nanoseconds)  # all zeros would stop it
        if self._settime(self._fd, 0, ctypes.byref(self._spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Not readable any more."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        os.close(self._fd)
