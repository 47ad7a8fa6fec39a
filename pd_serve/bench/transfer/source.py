"""The source process: it owns a pool of known bytes, and serves them to the reader that started it.

``python -m pd_serve.bench.transfer.source ENDPOINT``; it ends when told, or with the reader.
"""

from __future__ import annotations

import logging
import signal
import sys

import zmq

from pd_serve.bench.transfer.content import fill
from pd_serve.bench.transfer.ends import End, synchronize
from pd_serve.bench.transfer.messages import (
    Close,
    Failed,
    Open,
    Opened,
    Payload,
    Serve,
    Serving,
    ToReader,
    decode_to_source,
    encode,
)
from pd_serve.errors import PDServeError
from pd_serve.transfer.base import Pair, Reader
from pd_serve.transfer.slices import slicings
from pd_serve.transfer.timer import Timer

_MAX_SLEEP_S = 10.0


class Source:
    """One pool, one transport, one reader."""

    def __init__(self, socket: zmq.Socket[bytes], order: Open) -> None:
        self._socket = socket
        self._reader: Reader | None = None
        self._timer = Timer()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._timer.fileno(), zmq.POLLIN)
        self._end = End(order.lane, order.device, order.cumem, order.layout, order.num_blocks, "source")
        for group in range(len(self._end.memory.regions)):
            fill(self._end.tensor(group), order.seed)
        synchronize(order.device)
        self._send(Opened(self._end.transport.describe(), self._end.memory.regions))

    def _send(self, message: ToReader) -> None:
        self._socket.send(encode(message))

    def run(self) -> None:
        """Until the reader says that it is done."""
        while True:
            self._timer.arm(min(self._end.transport.progress(), _MAX_SLEEP_S))
            self._poller.poll()
            self._timer.clear()
            if not self._socket.poll(0):
                continue
            match decode_to_source(self._socket.recv()):
                case Serve(describe, layout, regions):
                    pair = Pair(slicings(self._end.layout, layout), self._end.memory.regions, regions)
                    self._reader = self._end.transport.serve(describe, pair, lambda data: self._send(Payload(data)))
                    self._send(Serving())
                case Payload(data):
                    assert self._reader is not None, "a transport's message before any reader"
                    self._reader.receive(data)
                case Close():
                    return

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._end.close()


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(sys.argv[1])
    try:
        order = decode_to_source(socket.recv())
        assert isinstance(order, Open), "Open comes first"
        source = Source(socket, order)
        try:
            source.run()
        finally:
            source.close()
    except PDServeError as error:
        socket.send(encode(Failed(str(error))))
    except Exception as error:
        socket.send(encode(Failed(f"{type(error).__name__}: {error}")))
    finally:
        context.destroy(linger=1000)


if __name__ == "__main__":
    main()
