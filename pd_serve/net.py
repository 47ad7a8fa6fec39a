"""Addresses: a port that is taken before anything slow begins, how others reach this machine, and which one it is."""

from __future__ import annotations

import socket
from pathlib import Path

from pd_serve.errors import ConfigError

_BACKLOG = 1024


def listen(host: str, port: int, settings: str = "--host or --port", *, shared: bool = False) -> socket.socket:
    """A listening socket, so that the port is known and ours before anything slow begins. ``settings``: of both.

    ``shared``: others of this user may listen there, too, and each gets a part of the connections.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another {settings}") from error
    return bound


def end_unread(listener: socket.socket, after_s: float) -> None:
    """Connections of ``listener`` end when the other side has read nothing for so long of what waits for it.

    The kernel sees to it (Linux): a client that stops reading its stream must not hold a request for ever.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(round(1000 * after_s), 2**31 - 1))


def reachable_host(host: str) -> str:
    """The address that others reach this machine at when it listens on ``host``."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address it would send from
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def netloc(host: str, port: int) -> str:
    """``host:port`` as a URL has it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def boot_id() -> str:
    """The same in all containers of a machine, and different on every other; empty where the kernel tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
