"""ZeroMQ sockets of the peer channel: their options, and how a lost connection is noticed."""

from __future__ import annotations

from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

# ZeroMQ's own pings, answered by its I/O thread whatever the peer computes: a host that vanished or a
# process that is stopped is noticed after the time-out, a process that was killed at once.
PING_MS = 2_000
PING_TIMEOUT_MS = 6_000

MAX_FRAME_BYTES = 16 << 20
MAX_QUEUED = 10_000  # messages a peer may leave unread before it counts as lost


@dataclass(frozen=True)
class Lost:
    """A connection ended (``fd``: its file descriptor, while it lived) or, dialling, never came about."""

    fd: int
    refused: bool


class Monitored:
    """A socket and the monitor that tells when one of its connections ends."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> None:
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self.socket.set(zmq.SNDHWM, MAX_QUEUED)
        self.socket.set(zmq.RCVHWM, MAX_QUEUED)
        self.socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self.socket.set(zmq.HEARTBEAT_IVL, PING_MS)
        self.socket.set(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
        # a new connection is a new session with its own handshake, so ZeroMQ must not renew it by itself
        self.socket.set(zmq.RECONNECT_IVL, -1)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        events |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(events)

    def lost(self) -> list[Lost]:
        """Connections that ended since the last call. Ask before reading messages: file descriptors are reused."""
        ended = []
        while self.monitor.poll(0):
            message = recv_monitor_message(self.monitor)
            ended.append(Lost(fd=message["value"], refused=message["event"] != zmq.EVENT_DISCONNECTED))
        return ended

    def close(self, linger_ms: int = 0) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
