"""How descriptors change hands: tokens, users, directories, limits; real Unix sockets."""

from __future__ import annotations

import os
import resource
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_serve.errors import TransferError
from pd_serve.transfer.base import PullState
from pd_serve.transfer.nvlink import NvlinkTransport, directory, fd_server, socket_directory
from pd_serve.transfer.nvlink.fd_client import close_all, fetch
from pd_serve.transfer.nvlink.fd_server import FdServer
from pd_serve.transfer.nvlink.messages import Offer, Range, encode, to_reader
from tests.memory.memfd import MemfdDriver
from tests.transfer.nvlink_ends import (
    Link,
    NumpyMover,
    Pool,
    SourceProcess,
    blocks,
    finished,
    layout,
    open_fds,
    pair_of,
    refused_as_somebody_else,
    until,
)

# Not beside others: paths of sockets are short, and namespaces are made of processes.
pytestmark = pytest.mark.slow

NEVER = threading.Event()


@pytest.fixture
def fds() -> Iterator[list[int]]:
    before = open_fds()
    made = [os.memfd_create(f"test{n}", os.MFD_CLOEXEC) for n in range(3)]
    for fd in made:
        os.ftruncate(fd, 4096)
    yield made
    close_all(made)
    until(lambda: open_fds() == before, 5)


@pytest.fixture
def server(tmp_path: Path, fds: list[int]) -> Iterator[FdServer]:
    made = FdServer(tmp_path)
    yield made
    made.close()
    assert not made.path.exists()


def same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def test_descriptors_arrive_in_order_however_many(tmp_path: Path, server: FdServer, fds: list[int]) -> None:
    wanted = fds * 50  # more than a packet takes
    token = server.grant(wanted)
    got = fetch(os.fspath(server.path), tmp_path, token, len(wanted), NEVER)
    assert len(got) == len(wanted)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert not any(os.get_inheritable(fd) for fd in got)
    close_all(got)


def test_wrong_and_revoked_tokens(tmp_path: Path, server: FdServer, fds: list[int]) -> None:
    token = server.grant(fds)
    other = server.grant(fds[:1])
    for wrong in (b"", b"x", bytes(32), token[:-1], token + b"x", bytes(4096)):
        with pytest.raises(TransferError) as caught:
            fetch(os.fspath(server.path), tmp_path, wrong, 3, NEVER, timeout_s=0.2)
        assert caught.value.kind == "connect"
    server.revoke(token)
    with pytest.raises(TransferError, match="token is not valid"):
        fetch(os.fspath(server.path), tmp_path, token, 3, NEVER)
    with pytest.raises(TransferError, match="gone"):  # fewer than there should be
        fetch(os.fspath(server.path), tmp_path, other, 3, NEVER)
    with pytest.raises(TransferError, match="3 descriptors for 2"):
        fetch(os.fspath(server.path), tmp_path, server.grant(fds), 2, NEVER)


def test_another_user_gets_nothing(
    tmp_path: Path, server: FdServer, fds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = server.grant(fds)
    server_thread = server._thread
    stranger = 54321

    def seen(by_server: bool) -> None:
        def peer_uid(_: socket.socket) -> int:
            return stranger if (threading.current_thread() is server_thread) == by_server else os.geteuid()

        monkeypatch.setattr(directory, "peer_uid", peer_uid)

    seen(by_server=True)
    with pytest.raises(TransferError, match="user 54321 is neither"):
        fetch(os.fspath(server.path), tmp_path, token, 3, NEVER)
    seen(by_server=False)  # the client finds a stranger listening: its token is not even sent
    with pytest.raises(TransferError, match="user 54321 listens"):
        fetch(os.fspath(server.path), tmp_path, token, 3, NEVER)


def test_a_real_process_of_another_user_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory(prefix="pd-serve-test-") as name:  # pytest's own is closed to others
        Path(name).chmod(0o777)
        server = FdServer(Path(name))
        refused_as_somebody_else(server.path)
        server.close()


def test_silent_clients_are_dropped_and_bounded(
    tmp_path: Path, server: FdServer, fds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fd_server, "CLIENT_TIMEOUT_S", 0.8)
    monkeypatch.setattr(fd_server, "MAX_CLIENTS", 4)
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
    for client in silent:
        client.settimeout(5)
        client.connect(os.fspath(server.path))
    until(lambda: len(server._clients) == 4)
    with pytest.raises(TransferError, match="connecting already"):
        fetch(os.fspath(server.path), tmp_path, server.grant(fds), 3, NEVER)
    for client in silent:
        assert client.recv(1) == b""
        client.close()
    got = fetch(os.fspath(server.path), tmp_path, server.grant(fds), 3, NEVER)
    close_all(got)


def test_a_silent_source_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "pd-serve-0123456789abcdef.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(os.fspath(path))
        silent.listen(1)
        with pytest.raises(TransferError, match=r"within 0\.1 s"):
            fetch(os.fspath(path), tmp_path, bytes(32), 1, NEVER, timeout_s=0.1)
        closed = threading.Event()
        closed.set()
        with pytest.raises(TransferError, match="closed"):
            fetch(os.fspath(path), tmp_path, bytes(32), 1, closed)
    with pytest.raises(TransferError, match="gone"):
        fetch(os.fspath(path), tmp_path, bytes(32), 1, NEVER)


def test_a_socket_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TransferError, match="not on this machine or the socket directory is not shared") as caught:
        fetch("/nowhere/pd-serve-0123456789abcdef.sock", tmp_path, bytes(32), 1, NEVER)
    assert caught.value.kind == "connect"
    assert "--nvlink-socket-dir" in str(caught.value)
    assert time.monotonic() - started < 1
    for path in ("relative/pd-serve-0123456789abcdef.sock", "/etc/passwd"):
        with pytest.raises(TransferError, match="no socket of pd-serve"):
            fetch(path, tmp_path, bytes(32), 1, NEVER)


def test_two_pods_may_mount_the_directory_at_different_places(tmp_path: Path, server: FdServer, fds: list[int]) -> None:
    got = fetch(f"/run/elsewhere/{server.path.name}", tmp_path, server.grant(fds), 3, NEVER)
    close_all(got)


def test_descriptors_that_do_not_fit_this_process(tmp_path: Path) -> None:
    source = SourceProcess(layout(), 8, tmp_path, cuts=2)
    driver = MemfdDriver()
    pool = Pool(driver, layout(), 8)
    transport = NvlinkTransport(driver, NumpyMover(), tmp_path)
    transport.register(pool.memory())
    peer = source.connect(transport, layout(), pool.regions)
    offer = to_reader(source._answer())
    assert isinstance(offer, Offer)
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    filler = [os.dup(0) for _ in range(highest + 1 - before)]  # no gaps
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
        with pytest.raises(TransferError, match=r"ulimit -n|too many open"):
            fetch(offer.socket, tmp_path, offer.token, 3, NEVER)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_all(filler)
    assert open_fds() == before
    peer.receive(encode(offer))  # and with room again
    assert finished(transport.pull(peer, [blocks(0, [1], [1])])) is PullState.DONE
    peer.close()
    transport.close()
    pool.free()
    driver.check_clean()
    source.close()


def test_a_descriptor_that_holds_less_than_was_offered(tmp_path: Path) -> None:
    driver = MemfdDriver()
    source_pool, pool = Pool(driver, layout(), 8, seed=1), Pool(driver, layout(), 8)
    transports = [NvlinkTransport(driver, NumpyMover(), tmp_path) for _ in range(2)]
    for transport, memory in zip(transports, (source_pool, pool), strict=True):
        transport.register(memory.memory())
    before = (driver.live_handles, driver.live_reservations, open_fds())
    pair = pair_of(layout(), source_pool.regions, layout(), pool.regions)
    session = Link(transports[1], transports[0], pair)
    session.reader_end.receive(session.to_source.pop())
    offer = to_reader(session.to_reader.pop())
    assert isinstance(offer, Offer)
    larger = [Range(r.address, r.size_bytes * 2, r.handle) for r in offer.ranges]
    session.peer.receive(encode(Offer(offer.source, offer.kind, larger, offer.socket, offer.token)))
    pull = transports[1].pull(session.peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert "were offered" in str(pull.error())
    session.close()
    for transport in transports:
        transport.close()
    assert (driver.live_handles, driver.live_reservations) == before[:2]
    assert open_fds() <= before[2]
    for memory in (source_pool, pool):
        memory.free()
    driver.check_clean()


# --- directories


def test_the_default_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))
    path = socket_directory("")
    assert path == tmp_path / "pd-serve"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert socket_directory("") == path
    path.chmod(0o755)
    with pytest.raises(TransferError, match=r"only this user can enter.*--nvlink-socket-dir"):
        socket_directory("")
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(TransferError, match="only this user"):
        socket_directory("")


def test_without_a_runtime_directory_it_is_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(directory.tempfile, "gettempdir", lambda: os.fspath(tmp_path))
    path = socket_directory("")
    assert path == tmp_path / f"pd-serve-{os.geteuid()}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_directory_that_is_missing_or_too_long_is_refused(short_path: Path) -> None:
    driver = MemfdDriver()
    source_pool, pool = Pool(driver, layout(), 8, seed=1), Pool(driver, layout(), 8)
    before = open_fds()
    for setting, why in ((short_path / "missing", "does not exist"), (short_path / ("x" * 100), "at most 107 bytes")):
        source = NvlinkTransport(driver, NumpyMover(), socket_directory(os.fspath(setting)))
        reader = NvlinkTransport(driver, NumpyMover(), short_path)
        source.register(source_pool.memory())
        reader.register(pool.memory())
        session = Link(reader, source, pair_of(layout(), source_pool.regions, layout(), pool.regions)).pump()
        with pytest.raises(TransferError, match=f"{why}.*"):  # what the source says is told to the reader
            reader.pull(session.peer, [blocks(0, [1], [1])])
        session.close()
        reader.close()
        source.close()
    assert open_fds() == before
    source_pool.free()
    pool.free()


def test_sockets_of_dead_processes_are_removed(tmp_path: Path, fds: list[int]) -> None:
    alive = FdServer(tmp_path)
    dead, young, other = (
        tmp_path / f"pd-serve-{'d' * 16}.sock",
        tmp_path / f"pd-serve-{'e' * 16}.sock",
        tmp_path / "not-ours.sock",
    )
    for path in (dead, young, other):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(os.fspath(path))
    long_ago = time.time() - 2 * directory.STALE_S
    for path in (dead, other, alive.path):
        os.utime(path, (long_ago, long_ago))
    (tmp_path / f"pd-serve-{'f' * 16}.sock").write_text("a file")
    second = FdServer(tmp_path)
    assert not dead.exists()
    assert young.exists() and other.exists() and (tmp_path / f"pd-serve-{'f' * 16}.sock").exists()
    got = fetch(os.fspath(alive.path), tmp_path, alive.grant(fds), 3, NEVER)
    close_all(got)
    second.close()
    alive.close()
