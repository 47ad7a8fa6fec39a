"""What the GIL costs a pull: the transfer thread shares the interpreter with the engine's loop.

    python -m benchmarks.switch_interval [--mib 4] [--repeats 60]

Two processes, a real outbox and a real inbox in host memory, as in usable.py. Meanwhile the reader's main thread is
busy in Python, or in a kernel that lets go of the GIL; it looks at events after 10 ms of that. Times run from the
source's announcement to the moment when the transfer thread says that the KV may be used. The switch interval changes
from block to block of repeats, in turns; beside it, how many rounds of its own the busy thread did a second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.usable import layout, make_identity, make_pool, source
from pd_serve.decode.inbox import Arrived, Failed, Inbox, Offered
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Source

STEP_S = 10e-3
INTERVALS_S = (5e-3, 0.2e-3)
TURNS = 3


def python(_: object) -> None:
    total = 0
    for i in range(200):
        total += i * i


def kernel(matrix: torch.Tensor) -> None:
    torch.mm(matrix, matrix)  # 1 ms or so on one core, without the GIL


def busy(work: Callable[[Any], None], matrix: object) -> int:
    rounds, end_s = 0, time.perf_counter() + STEP_S
    while time.perf_counter() < end_s:
        work(matrix)
        rounds += 1
    return rounds


class Reader:
    def __init__(self, options: argparse.Namespace) -> None:
        pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self.pipe = pipe
        self.process = multiprocessing.get_context("spawn").Process(
            target=source, args=(theirs, options, True), daemon=True
        )
        self.process.start()
        kv = layout(options.block_kib)
        self.count = options.mib * 1024 // options.block_kib
        self.pool = pool = make_pool(kv, options.blocks, None)  # as long as somebody writes to it
        me = make_identity("D", kv, True, "")
        self.worker = TransferWorker(lanes_for("auto", f"d-{me.epoch}", pool.memory(), reads_only=True))
        self.inbox = Inbox(me, self.worker, pull_timeout_s=30.0)
        self.said_s: dict[str, float] = {}
        put = self.inbox._events.put

        def noted(event: Any) -> None:
            if isinstance(event, Arrived):
                self.said_s[event.key] = time.monotonic()
            put(event)

        self.inbox._events.put = noted  # type: ignore[method-assign]
        self.worker.start()
        self.worker.wait_ready()
        epoch, address = pipe.recv()
        self.peer = Source("P", epoch, (address,))

    def pull(self, work: Callable[[Any], None] | None, matrix: object) -> tuple[float, int, float]:
        """Milliseconds to usable; rounds of work and the seconds they took."""
        key = uuid.uuid4().hex
        self.inbox.expect(key, self.peer)
        self.pipe.send([key])
        table = np.arange(1, self.count + 1, dtype=np.int32)
        rounds, began_s, ended = 0, time.perf_counter(), False
        while not ended:
            if work is None:
                time.sleep(0.2e-3)
            else:
                rounds += busy(work, matrix)
            for event in self.inbox.events():
                match event:
                    case Offered():
                        self.inbox.accept(event.key, [table], [0])
                    case Arrived():
                        ended = True
                    case Failed():
                        raise SystemExit(f"{event.kind}: {event.message}")
        took_s = time.perf_counter() - began_s
        return (self.said_s.pop(key) - self.pipe.recv()) * 1e3, rounds, took_s

    def close(self) -> None:
        self.pipe.send(None)
        self.worker.close()
        self.process.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4, help="of one request")
    parser.add_argument("--repeats", type=int, default=60, help="in each of three turns")
    options = parser.parse_args()
    options.block_kib, options.blocks, options.device, options.secret = 128, 512, "host", ""
    options.transport, options.pause_ms = "auto", 2.0
    reader = Reader(options)
    torch.set_num_threads(1)
    matrix = torch.rand(384, 384)
    loads: list[tuple[str, Callable[[Any], None] | None]] = [("idle", None), ("Python", python), ("kernel", kernel)]
    for name, work in loads:
        times: dict[float, list[float]] = {interval: [] for interval in INTERVALS_S}
        done = {interval: [0, 0.0] for interval in INTERVALS_S}
        for _ in range(TURNS):
            for interval in INTERVALS_S:
                sys.setswitchinterval(interval)
                for repeat in range(options.repeats + 3):
                    ms, rounds, took_s = reader.pull(work, matrix)
                    if repeat >= 3:
                        times[interval].append(ms)
                        done[interval][0] += rounds
                        done[interval][1] += took_s
        for interval, values in times.items():
            p50, p90, p99 = np.percentile(values, (50, 90, 99))
            rate = done[interval][0] / done[interval][1]
            print(
                f"RESULT {name}, switch interval {interval * 1e3:g} ms: {p50:.2f} ms to usable "
                f"(p90 {p90:.2f}, p99 {p99:.2f}); {rate:.0f} rounds/s",
                flush=True,
            )
    reader.close()


if __name__ == "__main__":
    main()
