"""Connections of the peer channel: frames in order, whole and in parts, slow and dead peers, names."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_serve.transfer.session import connection as module
from pd_serve.transfer.session.connection import Connection, Listener, dial, is_numeric, resolve
from tests.transfer.frames import Frames


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1")
    yield made
    made.close()


def wait(connection: Connection | Listener, timeout_s: float = 5.0) -> None:
    """Until it can do what it is interested in."""
    poller = select.epoll()
    poller.register(connection.fileno(), connection.interest)
    assert poller.poll(timeout_s), "nothing happens"
    poller.close()


def pair(listener: Listener) -> tuple[Connection, Connection]:
    ours = dial(resolve(listener.address))
    wait(listener)
    (theirs,) = listener.accept()
    return ours, theirs


def received(connection: Connection, count: int) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < count and not connection.ended:
        wait(connection)
        frames += connection.advance()
    return frames


def test_frames_arrive_whole_and_in_order(listener: Listener) -> None:
    ours, theirs = pair(listener)
    sent = [b"", b"one", os.urandom(100_000), b"last"]
    for frame in sent:
        ours.send(frame)  # before it is connected, too
    wait(ours)
    ours.advance()
    assert received(theirs, len(sent)) == sent
    theirs.send(b"back")
    assert received(ours, 1) == [b"back"]
    ours.close()
    theirs.close()


def test_a_frame_in_many_parts(listener: Listener) -> None:
    frames = Frames.dial(listener.address)
    wait(listener)
    (theirs,) = listener.accept()
    for byte in (5).to_bytes(4, "little") + b"parts" + b"\x01\x00":
        frames.raw.sendall(bytes([byte]))
        time.sleep(0.001)
    assert received(theirs, 1) == [b"parts"]
    frames.raw.sendall(b"\x00\x00!")
    assert received(theirs, 1) == [b"!"]
    frames.close()
    theirs.close()


def test_more_than_the_network_takes_at_once(listener: Listener) -> None:
    ours, theirs = pair(listener)
    wait(ours)
    ours.advance()
    changes: list[int] = []
    ours.changed = lambda: changes.append(ours.interest)
    large = os.urandom(12 << 20)
    ours.send(large)
    assert changes == [select.EPOLLIN | select.EPOLLOUT]
    frames: list[bytes] = []
    deadline_s = time.monotonic() + 10
    while not frames:
        assert time.monotonic() < deadline_s
        ours.advance()
        frames = list(theirs.advance())
    assert frames == [large]
    assert changes == [select.EPOLLIN | select.EPOLLOUT, select.EPOLLIN]
    ours.close()
    theirs.close()


def test_a_peer_that_does_not_read_is_given_up(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNSENT_BYTES", 1 << 20)
    ours, theirs = pair(listener)
    wait(ours)
    ours.advance()
    for _ in range(100):
        ours.send(bytes(1 << 20))
    assert "does not read" in ours.ended
    ours.close()
    theirs.close()


def test_what_was_said_last_is_heard_after_the_end(listener: Listener) -> None:
    ours, theirs = pair(listener)
    wait(ours)
    ours.advance()
    theirs.send(b"never read by us")
    ours.send(b"bye")
    time.sleep(0.05)
    ours.close()
    assert received(theirs, 1) == [b"bye"]
    while not theirs.ended:
        wait(theirs)
        assert list(theirs.advance()) == []
    assert not theirs.refused
    theirs.close()


def test_nobody_listens(listener: Listener) -> None:
    address = listener.address
    listener.close()
    ours = dial(resolve(address))
    while not ours.ended:
        wait(ours)
        ours.advance()
    assert ours.refused
    ours.close()


def test_a_reset_is_an_end(listener: Listener) -> None:
    ours, theirs = pair(listener)
    wait(ours)
    ours.advance()
    theirs._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    theirs._socket.close()
    while not ours.ended:
        wait(ours)
        ours.advance()
    ours.send(b"into the void")
    ours.close()


def test_a_length_that_cannot_be(listener: Listener) -> None:
    frames = Frames.dial(listener.address)
    wait(listener)
    (theirs,) = listener.accept()
    theirs.max_frame_bytes = 10
    frames.send(b"0123456789")
    assert received(theirs, 1) == [b"0123456789"]
    frames.send(b"0123456789a")
    wait(theirs)
    assert list(theirs.advance()) == []
    assert theirs.nonsense and "11 bytes" in theirs.ended
    frames.close()
    theirs.close()


def test_a_peer_that_talks_without_end_leaves_others_their_turn(listener: Listener) -> None:
    frames = Frames.dial(listener.address)
    wait(listener)
    (theirs,) = listener.accept()

    def talk() -> None:
        with contextlib.suppress(OSError):
            frames.raw.sendall(bytes(64 << 20))

    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    wait(theirs)
    theirs.advance()
    assert len(theirs._received) <= module.READS_A_TURN * module.READ_BYTES
    theirs.close()
    talker.join(5)
    frames.close()


def test_without_file_descriptors_who_comes_is_turned_away(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    frames = Frames.dial(listener.address)
    wait(listener)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        assert listener.accept() == []
        assert "ulimit -n" in caplog.text
        assert not select.select([listener], [], [], 0)[0], "nothing is left to wake the poller"
        assert listener.accept() == [] and caplog.text.count("ulimit -n") == 1
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert frames.ended()
    frames.close()
    ours, theirs = pair(listener)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "address", ["", "tcp://", "tcp://host", "tcp://:99", "http://127.0.0.1:1", "tcp://127.0.0.1:x", "tcp://[::1:7", "x"]
)
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(OSError):
        resolve(address)


def test_only_names_need_a_name_service() -> None:
    assert is_numeric("tcp://127.0.0.1:80") and is_numeric("tcp://[::1]:80") and is_numeric("tcp://[::1:80")
    assert not is_numeric("tcp://localhost:80")
    assert resolve("tcp://127.0.0.1:80")[0][1] == ("127.0.0.1", 80)
