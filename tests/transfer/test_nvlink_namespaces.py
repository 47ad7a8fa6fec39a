"""nvlink between containers: the source is in other PID, user and mount namespaces, and its process id says nothing."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.nvlink import directory as sockets
from pd_serve.transfer.nvlink.messages import Offer, to_reader
from tests.transfer.namespaces import PID, USER_AND_PID, namespace, unshare
from tests.transfer.nvlink_ends import (
    End,
    SourceProcess,
    layout,
    open_fds,
    pull_random_blocks,
    refused_as_somebody_else,
    settled,
)

# Not beside others: paths of sockets are short, and namespaces are made of processes.
pytestmark = pytest.mark.slow

Seen = list[tuple[int, int]]  # pid and uid of those at the other ends of sockets


def recording(seen: Seen) -> Callable[[socket.socket], int]:
    """``sockets.peer_uid``, which is told here what else the kernel says."""
    real = sockets.peer_uid

    def peer_uid(connection: socket.socket) -> int:
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        seen.append((pid, uid))
        return real(connection)

    return peer_uid


_seen_by_source: Seen = []


def record() -> None:
    """In the source's process."""
    sockets.peer_uid = recording(_seen_by_source)


def recorded() -> Seen:
    return _seen_by_source


def namespaces() -> dict[str, str]:
    return {kind: namespace(kind) for kind in ("pid", "user")}


@pytest.fixture(scope="module", params=[PID, USER_AND_PID], ids=" ".join)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[SourceProcess, Path]]:
    """A source in namespaces of its own; every user may enter the directory of its sockets."""
    under = unshare(request.param)
    with tempfile.TemporaryDirectory(prefix="pd-serve-test-") as name:  # pytest's own is closed to others
        directory = Path(name)
        directory.chmod(0o777)
        with closing(SourceProcess(layout(), 40, directory, cuts=2, under=under)) as source:
            ours, theirs = namespaces(), source.call(namespaces)
            differ = {f"--{kind}" for kind in ours if ours[kind] != theirs[kind]}
            assert differ == {*request.param} - {"--map-root-user"}
            yield source, directory


def test_descriptors_travel_between_pid_namespaces(
    served: tuple[SourceProcess, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, directory = served
    assert source.call(os.getpid) == 1
    source.call(record)
    seen: Seen = []
    monkeypatch.setattr(sockets, "peer_uid", recording(seen))
    before = open_fds()
    end = End(directory, layout(), 30, HostMover())
    peer = source.connect(end.transport, layout(), end.pool.regions)
    source.offer(peer)
    pull_random_blocks(end, source, peer, seed=0)
    assert end.mapped == 3
    # the user is checked on both sides; the source cannot name this process at all
    assert seen == [(source.pid, os.geteuid())]
    assert source.call(recorded) == [(0, source.call(os.geteuid))]
    peer.close()
    settled(end.transport)
    assert end.mapped == 0
    end.close()
    assert open_fds() == before


def test_another_user_gets_nothing_there_either(served: tuple[SourceProcess, Path]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    source, directory = served
    end = End(directory, layout(), 8)
    peer = source.connect(end.transport, layout(), end.pool.regions)
    offer = to_reader(source.offer(peer))
    assert isinstance(offer, Offer)
    refused_as_somebody_else(Path(offer.socket))
    peer.close()
    settled(end.transport)
    end.close()


def test_the_directory_may_be_mounted_at_another_place_there(short_path: Path) -> None:
    here, there = short_path / "here", short_path / "there"
    here.mkdir()
    there.mkdir()
    mounted = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', os.fspath(here), os.fspath(there)]
    under = unshare((*PID, "--mount"), (*USER_AND_PID, "--mount"), then=mounted)
    with closing(SourceProcess(layout(), 40, there, under=under)) as source:
        end = End(here, layout(), 30, HostMover())
        peer = source.connect(end.transport, layout(), end.pool.regions)
        offer = to_reader(source.offer(peer))
        assert isinstance(offer, Offer)
        assert Path(offer.socket).parent == there
        assert list(there.iterdir()) == []
        pull_random_blocks(end, source, peer, seed=1)
        peer.close()
        settled(end.transport)
        end.close()
