"""What a transfer thread waits with: file descriptors, or a time exact to some microseconds.

Used by the transfer thread, and by benchmarks that stand for one. Beside a GPU short waits are not slept: waking up
takes as long as NVLink needs for 20 MiB, and its host has cores to spare. They are slept while the main thread needs
the interpreter (:mod:`pd_serve.interpreter`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import time

from pd_serve.interpreter import main_thread

TFD_NONBLOCK = 0o4000
TFD_CLOEXEC = 0o2000000
SPIN_S = 100e-6  # waits up to here are spun where ``spin`` is set
NAP_S = 100e-6  # slept at least instead, while the main thread is at work


def look_s(device: int | None) -> float:
    """How soon to look again at what is under way in this kind of memory: within ``SPIN_S`` on a GPU."""
    return 50e-6 if device is None else 5e-6


class Poller:
    """``close`` it."""

    def __init__(self, *, spin: bool = False) -> None:
        self.spin = spin
        self._timer = Timer()
        self._epoll = select.epoll()
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)

    def register(self, descriptor: int, interest: int) -> None:
        """``interest``: ``select.EPOLLIN``, ``EPOLLOUT``."""
        self._epoll.register(descriptor, interest)

    def modify(self, descriptor: int, interest: int) -> None:
        self._epoll.modify(descriptor, interest)

    def unregister(self, descriptor: int) -> None:
        """Before it is closed."""
        self._epoll.unregister(descriptor)

    def wait(self, delay_s: float) -> list[int]:
        """Descriptors that can do what they are registered for, as soon as there is one, or after ``delay_s``."""
        if delay_s <= 0:
            return self._found(self._epoll.poll(0))
        if self.spin and delay_s <= SPIN_S:
            if not main_thread.at_work:
                until_s = time.perf_counter() + delay_s
                while not (ready := self._epoll.poll(0)) and time.perf_counter() < until_s:
                    pass
                return self._found(ready)
            delay_s = NAP_S
        self._timer.arm(delay_s)
        ready = self._epoll.poll()
        self._timer.clear()
        return self._found(ready)

    def _found(self, ready: list[tuple[int, int]]) -> list[int]:
        own = self._timer.fileno()
        return [descriptor for descriptor, _ in ready if descriptor != own]

    def close(self) -> None:
        self._epoll.close()
        self._timer.close()


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: the interval, unused, and the time from now."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "s", "ns")]


class Timer:
    """Readable once its time has come, exact to some microseconds.

    A poller knows only whole milliseconds, and a sleep cannot be woken by a message. Python has timerfd from 3.13 on;
    before that it is called through ctypes.
    """

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
