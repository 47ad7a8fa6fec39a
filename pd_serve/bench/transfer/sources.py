"""The reader's handle on a source process: starts it, talks to it, and ends it."""

from __future__ import annotations

import signal
import sys
import time

from pd_serve.bench.transfer.link import Link
from pd_serve.bench.transfer.messages import Close, Failed, ToReader, ToSource, decode_to_reader, encode
from pd_serve.errors import FailureKind, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region
from pd_serve.processes import Child, describe_exit
from pd_serve.transfer.base import Pair, Peer
from pd_serve.transfer.session.connection import Listener

_CLOSE_TIMEOUT_S = 5.0


class SourceProcess:
    """A source, and what the reader knows of it."""

    def __init__(self, rank: int, layout: KVLayout) -> None:
        self.rank = rank
        self.layout = layout
        self.regions: tuple[Region, ...] = ()
        self.peer: Peer | None = None
        self.pair: Pair | None = None
        self._unsent: list[bytes] = []  # until it has dialled
        self._link: Link | None = None
        self._listener = Listener("127.0.0.1")
        self._child = Child([sys.executable, "-m", "pd_serve.bench.transfer.source", self._listener.address])

    def send(self, message: ToSource) -> None:
        if self._link is None:
            self._unsent.append(encode(message))
        else:
            self._link.send(encode(message))

    def take(self) -> ToReader | None:
        """The next message, if there is one. Raises TransferError for a source that failed or died."""
        if self._link is None:
            for connection in self._listener.accept()[:1]:
                self._link = Link(connection)
                for unsent in self._unsent:
                    self._link.send(unsent)
            return None
        frame = self._link.take()
        if frame is None:
            return None
        message: ToReader = decode_to_reader(frame)
        if isinstance(message, Failed):
            raise TransferError(FailureKind.PEER_LOST, f"source process: {message.message}")
        return message

    def check_alive(self) -> None:
        status = self._child.returncode()
        if status is not None and (self._link is None or self._link.ended):
            raise TransferError(FailureKind.PEER_LOST, f"the source process ended ({describe_exit(status)})")

    def close(self) -> None:
        """In order where it answers, by force where it does not: what it left in shared memory must go."""
        self.send(Close())
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._child.returncode() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        self._child.send_signal(signal.SIGKILL)
        if self._link is not None:
            self._link.close()
        self._listener.close()
