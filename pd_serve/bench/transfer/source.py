"""The source process: it owns a pool of known bytes, and serves them to the reader that started it, lane after lane.

``python -m pd_serve.bench.transfer.source ENDPOINT``; it ends when told, or with the reader.
"""

from __future__ import annotations

import logging
import signal
import sys

from pd_serve.bench.transfer.content import fill
from pd_serve.bench.transfer.ends import End, synchronize
from pd_serve.bench.transfer.link import Link
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

_MAX_SLEEP_S = 10.0


class Source:
    """One pool, one transport, one reader."""

    def __init__(self, link: Link, order: Open) -> None:
        self._link = link
        self._reader: Reader | None = None
        link.poller.spin = order.device is not None  # as a node's transfer thread does
        self._end = End(order.lane, order.device, order.cumem, order.layout, order.num_blocks, "source")
        for group in range(len(self._end.memory.regions)):
            fill(self._end.tensor(group), order.seed)
        synchronize(order.device)
        self._send(Opened(self._end.transport.describe(), self._end.memory.regions))

    def _send(self, message: ToReader) -> None:
        self._link.send(encode(message))

    def run(self) -> bool:
        """Until the reader says that it is done; whether it wants to open another."""
        while True:
            frame = self._link.take(min(self._end.transport.progress(), _MAX_SLEEP_S))
            if frame is None:
                if self._link.ended:
                    return False
                continue
            match decode_to_source(frame):
                case Serve(describe, layout, regions):
                    pair = Pair(slicings(self._end.layout, layout), self._end.memory.regions, regions)
                    self._reader = self._end.transport.serve(describe, pair, lambda data: self._send(Payload(data)))
                    self._send(Serving())
                case Payload(data):
                    assert self._reader is not None, "a transport's message before any reader"
                    self._reader.receive(data)
                case Close(again):
                    return again

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._end.close()


def _serve(link: Link, order: Open) -> bool:
    """One lane; whether there is to be another. The reader hears why it fails."""
    try:
        source = Source(link, order)
        try:
            return source.run()
        finally:
            source.close()
    except PDServeError as error:
        link.send(encode(Failed(str(error))))
    except Exception as error:
        link.send(encode(Failed(f"{type(error).__name__}: {error}")))
    return True


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    link = Link.dial(sys.argv[1])
    try:
        more = True
        while more and not link.ended:
            if (frame := link.take(_MAX_SLEEP_S)) is None:
                continue
            match decode_to_source(frame):
                case Open() as order:
                    more = _serve(link, order)
                case Close(again):
                    more = again
                case _:
                    continue  # meant for what has failed
    finally:
        link.close()


if __name__ == "__main__":
    main()
