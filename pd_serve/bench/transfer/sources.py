"""The reader's handle on a source process: starts it, talks to it, and ends it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path

import zmq

from pd_serve.bench.transfer.messages import Close, Failed, ToReader, ToSource, decode_to_reader, encode
from pd_serve.errors import TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region
from pd_serve.processes import Child, describe_exit
from pd_serve.transfer.base import Pair, Peer
from pd_serve.wire.peer import FailureKind

_CLOSE_TIMEOUT_S = 5.0


class SourceProcess:
    """A source, and what the reader knows of it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path, rank: int, layout: KVLayout) -> None:
        self.rank = rank
        self.layout = layout
        self.regions: tuple[Region, ...] = ()
        self.peer: Peer | None = None
        self.pair: Pair | None = None
        endpoint = f"ipc://{directory}/{rank}"
        self._socket = context.socket(zmq.PAIR)
        self._socket.bind(endpoint)
        self._child = Child([sys.executable, "-m", "pd_serve.bench.transfer.source", endpoint])

    def send(self, message: ToSource) -> None:
        self._socket.send(encode(message))

    def take(self) -> ToReader | None:
        """The next message, if there is one. Raises TransferError for a source that failed or died."""
        try:
            message: ToReader = decode_to_reader(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        if isinstance(message, Failed):
            raise TransferError(FailureKind.PEER_LOST, f"source process: {message.message}")
        return message

    def check_alive(self) -> None:
        status = self._child.returncode()
        if status is not None and not self._socket.poll(0):
            raise TransferError(FailureKind.PEER_LOST, f"the source process ended ({describe_exit(status)})")

    def close(self) -> None:
        """In order where it answers, by force where it does not: what it left in shared memory must go."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(encode(Close()), zmq.NOBLOCK)
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._child.returncode() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        self._child.send_signal(signal.SIGKILL)
        self._socket.close(linger=0)
