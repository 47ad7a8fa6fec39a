"""Hands out file descriptors of the source's memory over a Unix socket, on a thread of its own.

Built by the source's side of the transport when the first reader asks. A client is checked twice: its user must be ours
or root, and it must show a token that was granted over the authenticated peer channel. The thread never waits for one
client, and touches neither the driver nor the transport; it keeps a handful of numbers a client.

The exchange, in packets (SOCK_SEQPACKET): the client sends its token; the server answers packets of :data:`GIVE` with
up to :data:`FDS_PER_PACKET` descriptors each, in order, or one of :data:`REFUSE` and the reason; then it closes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.nvlink import directory
from pd_serve.transfer.nvlink.messages import TOKEN_BYTES

log = logging.getLogger(__name__)

GIVE = b"g"
REFUSE = b"r"
FDS_PER_PACKET = 64  # Linux: 253
MAX_CLIENTS = 32
CLIENT_TIMEOUT_S = 2.0
ACCEPT_PAUSE_S = 0.05


class FdServer:
    """The socket, its thread and the grants. Descriptors stay their owner's, who closes them after ``close``."""

    def __init__(self, socket_dir: Path) -> None:
        """Raises TransferError, with what to do about it."""
        self.path = directory.new_path(socket_dir)
        self._lock = threading.Lock()
        self._grants: dict[bytes, tuple[int, ...]] = {}  # by digest: a look-up then tells nothing of the token
        self._clients: dict[socket.socket, float] = {}  # connected, silent so far: until when it may be
        self._stopping = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            directory.remove_stale(socket_dir)
            self._listener.bind(os.fspath(self.path))
            self._listener.listen(MAX_CLIENTS)
        except OSError as error:
            self._listener.close()
            raise TransferError(
                FailureKind.CONNECT, f"cannot listen on {self.path} ({error}); set --nvlink-socket-dir to another"
            ) from error
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="pd-nvlink-fds", daemon=True)
        self._thread.start()

    # --- any thread

    def grant(self, fds: Sequence[int]) -> bytes:
        """A token for which these descriptors are given, as often as it is shown, until ``revoke``."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._grants[_digest(token)] = tuple(fds)
        return token

    def revoke(self, token: bytes) -> None:
        with self._lock:
            self._grants.pop(_digest(token), None)

    def close(self) -> None:
        """Returns once no descriptor can be given any more. Idempotent."""
        if not self._stopping:
            self._stopping = True
            self._wake.send(b"x")
        self._thread.join()

    # --- its thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._time_left_s()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._clients:
                        self._serve(key.fileobj)
                self._drop_silent()
        except Exception:
            log.exception(
                "the thread that hands out descriptors of device memory has ended; nvlink takes no new readers"
            )
        finally:
            self._tear_down()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            log.warning("cannot take a reader at %s: %s", self.path, error)
            time.sleep(ACCEPT_PAUSE_S)  # out of descriptors: the socket stays readable
            return
        client.setblocking(False)
        uid = directory.peer_uid(client)
        if not directory.is_trusted(uid):
            log.warning("refused user %d at %s", uid, self.path)
            _refuse(client, f"user {uid} is neither user {os.geteuid()} nor root; run both nodes as the same user")
        elif len(self._clients) >= MAX_CLIENTS:
            _refuse(client, f"{MAX_CLIENTS} readers are connecting already; try again")
        else:
            self._clients[client] = time.monotonic() + CLIENT_TIMEOUT_S
            self._selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket) -> None:
        self._forget(client)
        try:
            token = client.recv(TOKEN_BYTES + 1)
        except OSError:
            token = b""
        with self._lock:
            fds = self._grants.get(_digest(token))
            if fds is None:
                if token:
                    log.warning("refused a reader with a wrong token at %s", self.path)
                _refuse(client, "the token is not valid (any more): the session has ended or the source started anew")
                return
            try:
                for at in range(0, len(fds), FDS_PER_PACKET):
                    socket.send_fds(client, [GIVE], fds[at : at + FDS_PER_PACKET])
            except OSError as error:
                log.warning("a reader did not take the descriptors of the pool: %s", error)
        client.close()

    def _time_left_s(self) -> float | None:
        if not self._clients:
            return None
        return max(0.0, min(self._clients.values()) - time.monotonic())

    def _drop_silent(self) -> None:
        now_s = time.monotonic()
        for client in [c for c, until_s in self._clients.items() if until_s <= now_s]:
            self._forget(client)
            client.close()

    def _forget(self, client: socket.socket) -> None:
        del self._clients[client]
        self._selector.unregister(client)

    def _tear_down(self) -> None:
        self.path.unlink(missing_ok=True)
        for client in self._clients:
            client.close()
        self._selector.close()
        for each in (self._listener, self._wake, self._woken):
            each.close()


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _refuse(client: socket.socket, reason: str) -> None:
    try:
        client.send(REFUSE + reason.encode())
    except OSError:
        pass  # it left
    client.close()
