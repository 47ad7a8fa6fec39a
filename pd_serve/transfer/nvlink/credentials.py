"""Who is at the other end of a Unix socket. Users only: process ids mean nothing across PID namespaces."""

from __future__ import annotations

import os
import socket
import struct

_UCRED = struct.Struct("3i")  # pid, uid, gid


def peer_uid(connection: socket.socket) -> int:
    """The user who connected, or who listens, in our user namespace's numbers (65534 for one that it does not know)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


def is_trusted(uid: int) -> bool:
    return uid in (0, os.geteuid())
