"""The sockets over which descriptors of device memory are handed out: their directory, names, and who may use them.

Called by whoever builds the transport (:func:`socket_directory`) and by the server and its client. The default
directory is private to the user; one named by a setting belongs to whoever made it: two containers can share it.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
import struct
import tempfile
import time
from pathlib import Path

from pd_serve.errors import FailureKind, TransferError

NAME = re.compile(r"pd-serve-[0-9a-f]{16}\.sock")
MAX_PATH_BYTES = 107  # sockaddr_un
STALE_S = 10.0  # younger sockets may be between bind and listen
_UCRED = struct.Struct("3i")  # pid, uid, gid


def socket_directory(setting: str) -> Path:
    """``nvlink_socket_dir``, or a directory of mode 0700 for this user. Raises TransferError."""
    if setting:
        return Path(setting).absolute()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        path = Path(runtime) / "pd-serve"
    else:
        path = Path(tempfile.gettempdir()) / f"pd-serve-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, str(error)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise _unusable(path, "it is not a directory that only this user can enter")
    return path.absolute()


def new_path(directory: Path) -> Path:
    """A path for a socket that no other has. Raises TransferError where none can be bound there."""
    path = directory.absolute() / f"pd-serve-{secrets.token_hex(8)}.sock"
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise _unusable(directory, f"paths of sockets have at most {MAX_PATH_BYTES} bytes")
    if not directory.is_dir():
        raise _unusable(directory, "it does not exist; create it, and in Kubernetes mount it in both pods")
    return path


def remove_stale(directory: Path) -> int:
    """Removes sockets that nobody listens on any more; returns how many."""
    removed = 0
    for path in directory.iterdir():
        try:
            found = path.lstat()
            if not NAME.fullmatch(path.name) or not stat.S_ISSOCK(found.st_mode):
                continue
            if time.time() - found.st_mtime > STALE_S and _is_dead(path):
                path.unlink()
                removed += 1
        except OSError:
            pass  # somebody else's, or removed meanwhile
    return removed


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, in our user namespace's numbers (65534 for one that it does not know).

    Users only: process ids mean nothing across PID namespaces.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


def is_trusted(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass  # busy, or not for us
    return False


def _unusable(path: Path, why: str) -> TransferError:
    return TransferError(
        FailureKind.CONNECT, f"nvlink cannot use {path} for its sockets ({why}); set --nvlink-socket-dir to another"
    )
