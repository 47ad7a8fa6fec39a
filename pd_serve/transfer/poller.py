"""What a transfer thread waits with: file descriptors, or a time exact to some microseconds.

Used by the transfer thread, and by benchmarks that stand for one. Beside a GPU short waits are not slept: waking up
takes as long as NVLink needs for 20 MiB, and its host has cores to spare.
"""

from __future__ import annotations

import select
import time

from pd_serve.transfer.timer import Timer

SPIN_S = 100e-6  # waits up to here are spun where ``spin`` is set


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
            until_s = time.perf_counter() + delay_s
            while not (ready := self._epoll.poll(0)) and time.perf_counter() < until_s:
                pass
            return self._found(ready)
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
