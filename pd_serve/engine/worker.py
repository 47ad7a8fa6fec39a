"""``python -m pd_serve.engine.worker``: a rank of an engine beyond the first, from its first line to its last.

It does what comes over the line, in order: computes steps, whose results rank 0 has too, and passes calls on to its
transfer end. It has no loop of its own, no scheduler and no clock. It ends with rank 0, however that ends.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from pd_serve.compute.copies import HostCopies
from pd_serve.compute.executor import Executor
from pd_serve.compute.step import decode
from pd_serve.config import EngineConfig
from pd_serve.engine import line
from pd_serve.engine.boot import identity_of, set_up, share_of
from pd_serve.engine.line import Answer, Kind, Line, LineClosed
from pd_serve.engine.rank_copies import obey, tell_by
from pd_serve.engine.ranks import RankConfig, meet
from pd_serve.errors import PDServeError
from pd_serve.interpreter import main_thread
from pd_serve.transfer.relay import RelayServer

log = logging.getLogger(__name__)


class Worker:
    def __init__(self, executor: Executor[Any], transfer: RelayServer, orders: Line, copies: HostCopies | None) -> None:
        self._executor = executor
        self._copies = copies
        self._transfer = transfer
        self._line = orders
        self._launched: deque[Any] = deque()

    def run(self) -> None:
        """Until rank 0 says so. Raises LineClosed where it is gone, and whatever a step raises."""
        while True:
            main_thread.at_work = False
            kind, payload = self._line.receive()
            main_thread.at_work = True
            match kind:
                case Kind.STEP:
                    self._launched.append(self._executor.launch(decode(payload)))
                    while len(self._launched) > self._executor.depth:
                        self._executor.collect(self._launched.popleft())
                case Kind.TRANSFER:
                    self._transfer.told(payload)
                case Kind.COPIES:
                    assert self._copies is not None  # rank 0 has a host tier, too
                    obey(self._copies, payload)
                case _:
                    order = line.decode_order(payload)
                    if isinstance(order, line.Stop):
                        return
                    self._line.send(Kind.ANSWER, line.encode(self._obey(order)))

    def _obey(self, order: line.Sleep | line.Wake) -> Answer:
        while self._launched:  # rank 0 has collected its own
            self._executor.collect(self._launched.popleft())
        try:
            match order:
                case line.Sleep(level):
                    self._executor.sleep(level)
                case line.Wake(tags):
                    self._executor.wake(tags)
        except (PDServeError, OSError) as error:
            return Answer(str(error))
        return Answer()


def build(told: RankConfig, config: EngineConfig, orders: Line) -> Worker:
    """Loads the rank's part of the model. Raises PDServeError."""
    import torch

    torch.set_grad_enabled(False)

    from pd_serve.compute.backend import backend_for
    from pd_serve.engine.ends import RankEnds, open_ends
    from pd_serve.engine.tier import open_tier
    from pd_serve.models.sizes import sizes

    fit = sizes(config, Path(config.model), config.template, rank=told.rank)
    backend = backend_for(config)
    executor = backend.make_executor(config, fit, lambda device: meet(told.directory, told.rank, config.tp, device))
    executor.load()
    identity = identity_of(config, fit, rank=told.rank)

    def make_ends(epoch: str) -> RankEnds:
        return open_ends(config, replace(identity, epoch=epoch), executor.memory()[0])

    tell = tell_by(socket.socket(fileno=told.copies_fd))
    copies = open_tier(config, backend, fit.layout, executor.memory()[0], tell)
    executor.warm_up()
    return Worker(executor, RelayServer(socket.socket(fileno=told.relay_fd), make_ends), orders, copies)


def main() -> int:
    told = msgspec.json.decode(sys.stdin.buffer.read(), type=RankConfig)
    config = share_of(told.config, told.rank)
    set_up(config, f"rank {told.rank}")
    orders = Line(socket.socket(fileno=told.line_fd))
    try:
        try:
            worker = build(told, config, orders)
        except PDServeError as error:
            orders.send(Kind.ANSWER, line.encode(Answer(str(error), mendable=True)))
            return 1
        orders.send(Kind.ANSWER, line.encode(Answer()))
        worker.run()
    except LineClosed:
        log.warning("rank 0 is gone: this rank ends")
        return 1
    return 0


def end() -> None:
    """Without the interpreter's end, which may wait for a device that waits for another rank."""
    status = 1
    try:
        status = main()
    except BaseException as error:
        log.critical("this rank ends, and with it the engine: %r", error, exc_info=error)
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    end()
