"""Ports for servers of tests, which may end and come back on the same one."""

from __future__ import annotations

import random
import socket

# Below what the kernel takes for connections: one of those, of another test, would have it when a server comes back.
_RANGE = range(16_384, 32_768)


def free_port() -> int:
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many in a row that nobody has."""
    while True:
        # not of random itself: workers are forks, and all would draw the same
        first = random.SystemRandom().choice(_RANGE[: 1 - count or None])
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
