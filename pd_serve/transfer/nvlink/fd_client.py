"""Fetches the descriptors of a source's memory from its Unix socket: the other end of :mod:`fd_server`.

Called on the reader's mapping thread, which may wait. Whatever goes wrong, no descriptor is left open.
"""

from __future__ import annotations

import array
import os
import select
import socket
import stat
import threading
import time
from pathlib import Path

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.nvlink import directory
from pd_serve.transfer.nvlink.fd_server import FDS_PER_PACKET, GIVE, REFUSE
from pd_serve.transfer.nvlink.messages import Range

FETCH_TIMEOUT_S = 5.0  # the source's thread shares its interpreter with an engine that may be busy
FD_BYTES = array.array("i").itemsize
STEP_S = 0.02  # how soon a closed transport ends a fetch


def fetch(
    path: str, own_dir: Path, token: bytes, count: int, stop: threading.Event, timeout_s: float = FETCH_TIMEOUT_S
) -> list[int]:
    """``count`` descriptors, the caller's to close. Raises TransferError (CONNECT)."""
    patience = _Patience(timeout_s, stop)
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            _connect(connection, _find(path, own_dir), patience)
            uid = directory.peer_uid(connection)
            if not directory.is_trusted(uid):
                raise _failed(f"user {uid} listens on {path}, neither user {os.geteuid()} nor root")
            _send(connection, token)
            while len(fds) < count:
                patience.wait_readable(connection)
                _receive(connection, fds)
            if len(fds) != count:
                raise _failed(f"the source gave {len(fds)} descriptors for {count} allocations")
    except BaseException as error:
        close_all(fds)
        if isinstance(error, OSError):
            raise _explained(path, error) from error
        raise
    return fds


def check_sizes(fds: list[int], ranges: list[Range]) -> None:
    """Raises TransferError where a descriptor says that it holds less than was offered (device memory does not say)."""
    for fd, offered in zip(fds, ranges, strict=True):
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_size < offered.size_bytes:
            raise _failed(f"a descriptor holds {found.st_size} bytes where {offered.size_bytes} were offered")


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()


def _find(path: str, own_dir: Path) -> Path:
    """Two containers may have mounted the same directory at different places; the name is the same."""
    named = Path(path)
    if not named.is_absolute() or not directory.NAME.fullmatch(named.name):
        raise _failed(f"{path!r} is no socket of pd-serve")
    for candidate in (named, own_dir / named.name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(path)


def _send(connection: socket.socket, token: bytes) -> None:
    try:
        connection.send(token)
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before it was sent: the reason can be read


def _receive(connection: socket.socket, fds: list[int]) -> None:
    room = socket.CMSG_SPACE(FDS_PER_PACKET * FD_BYTES)
    try:  # not socket.recv_fds: in Python 3.11 it ignores the flag that keeps descriptors from child processes
        data, extras, flags, _ = connection.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # closed without reading the token; said once, before the reason
        data, extras, flags, _ = connection.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
    got: list[int] = []
    for level, kind, extra in extras:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(extra) - len(extra) % FD_BYTES
            got += array.array("i", extra[:whole])
    fds.extend(got)
    if flags & socket.MSG_CTRUNC:
        raise _failed("descriptors were lost on the way: this process has too many open; raise the limit (ulimit -n)")
    if data[:1] == REFUSE:
        raise _failed(f"the source refused: {data[1:].decode(errors='replace')}")
    if data != GIVE or not got:
        raise _failed("the source is gone" if not data else "the source's answer makes no sense")


def _connect(connection: socket.socket, path: Path, patience: _Patience) -> None:
    while True:
        try:
            return connection.connect(os.fspath(path))
        except BlockingIOError:  # its queue is full
            patience.check()
            time.sleep(STEP_S)


class _Patience:
    """Waits that end when time is up or the transport is closed."""

    def __init__(self, timeout_s: float, stop: threading.Event) -> None:
        self._timeout_s = timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._stop = stop

    def check(self) -> None:
        if time.monotonic() >= self._until_s:
            raise _failed(f"the source did not hand its memory over within {self._timeout_s:g} s")
        if self._stop.is_set():
            raise _failed("the transport was closed")

    def wait_readable(self, connection: socket.socket) -> None:
        poller = select.poll()  # not select(): a node may have more than 1024 descriptors open
        poller.register(connection, select.POLLIN)
        while not poller.poll(STEP_S * 1e3):
            self.check()


def _explained(path: str, error: OSError) -> TransferError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _failed(
            f"the source is not on this machine or the socket directory is not shared: there is no {path} here; "
            "set --nvlink-socket-dir on both nodes to a directory that both see"
        )
    if isinstance(error, ConnectionRefusedError | ConnectionResetError | BrokenPipeError):
        return _failed(f"the source is gone: nobody listens on {path}")
    if isinstance(error, PermissionError):
        return _failed(f"this user may not use {path} ({error}); run both nodes as the same user")
    return _failed(f"{path}: {error}")


def _failed(message: str) -> TransferError:
    return TransferError(FailureKind.CONNECT, message)
