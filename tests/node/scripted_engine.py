"""An engine process that computes nothing: it speaks the node's protocol as its first argument tells it to.

Its outputs are the tokens it was sent, one each 10 ms. What it heard is in its status counters.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import msgspec
import zmq

from pd_serve.config import EngineConfig
from pd_serve.wire import engine, link
from pd_serve.wire.memory import MemoryReport, TagUsage

BEHAVIOUR = sys.argv[1]
FLOOD_BYTES = 200 << 20


def main() -> int:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(config.address)
    pulse = socket.context.socket(zmq.PUSH)
    pulse.connect(config.pulse_address)

    def say(message: engine.FromEngine, origin: int = 0) -> None:
        socket.send_multipart([origin.to_bytes(4, "little"), engine.encoder.encode(message)])

    if BEHAVIOUR == "fails":
        say(engine.EngineFailed("the pool is too small; raise --kv-cache-memory"))
        time.sleep(0.2)
        return 1
    if BEHAVIOUR == "never-ready":
        time.sleep(60)
    if BEHAVIOUR == "crashes":
        return 3
    heard: Counter[str] = Counter()
    submits: dict[int, int] = {}
    running_step: link.Running | None = None
    running: list[tuple[int, str, list[int], int]] = []  # origin, id, tokens, next index
    draining = drained = False
    bedtime: engine.Sleep | None = None
    level, asleep, epoch = 0, list[str](), 1
    lets_in = BEHAVIOUR not in ("shut", "no-door")

    def load() -> link.Load:
        groups = [link.GroupUsage(total=10, used=len(running), cached=2, free=8 - len(running))]
        return link.Load(0, len(running), 0, groups, draining=draining or level > 0)

    def ready() -> engine.EngineReady:
        addresses = (f"tcp://127.0.0.1:{epoch}",) if lets_in else ()
        return engine.EngineReady(
            model, "1a40", "a layout", f"epoch-{epoch}", addresses, "nixl", load(), {"import": 0.1}
        )

    def status() -> engine.Report:
        tags = {"weights": TagUsage(20, 30, 20), "kv_cache": TagUsage(8, 8, 0 if "kv_cache" in asleep else 8)}
        counters = {name: float(count) for name, count in heard.items()} | {"leaks": 0.0}
        report = link.Status(
            load(), counters, MemoryReport("cpu", tags, 0.25, list(asleep), {"weights": TagUsage(6, 6, 7)})
        )
        return engine.Report(report, dict(submits))

    model = link.ModelInfo(config.served_model_name, "f00d", 128, 1000, [2])
    say(ready())
    status_due_s = 0.0
    while True:
        while socket.poll(10):
            origin_frame, payload = socket.recv_multipart()
            origin = int.from_bytes(origin_frame, "little")
            message = (engine.decode_to_engine if origin == 0 else link.decode_to_node)(payload)
            heard[f"heard_{type(message).__name__.lower()}"] += 1
            if isinstance(message, link.Submit):
                submits[origin] = message.number
            match message:
                case engine.Shutdown():
                    return 0
                case engine.Drain():
                    draining = True
                case engine.Sleep():
                    bedtime = message
                    if message.now:
                        running = []
                case engine.Wake(number=number, tags=tags):
                    asleep = [tag for tag in asleep if tag not in tags]
                    failure = "no files" if BEHAVIOUR == "sleeps-for-ever" else ""
                    if level and not asleep and not failure:
                        level, epoch = 0, epoch + 1
                        say(ready())
                    say(engine.SleepState(number, level, asleep, failure))
                case engine.Listen(number=number) if BEHAVIOUR == "no-door":
                    say(engine.SleepState(number, level, asleep, "cannot listen on 192.0.2.1; set --peer-host"))
                case engine.Listen(number=number):
                    lets_in = True
                    if not level:
                        say(ready())
                    say(engine.SleepState(number, level, asleep))
                case engine.Drop(origin=gone):
                    running = [entry for entry in running if entry[0] != gone]
                    heard[f"dropped_{gone}"] += 1
                case link.Abort(ids=ids):
                    running = [entry for entry in running if entry[1] not in ids]
                case link.Submit(id=name, tokens=tokens) if name == "flood":
                    frame = link.encoder.encode(link.Outputs([link.Output(name, 0, [1] * 100_000)]))
                    for _ in range(FLOOD_BYTES // len(frame)):
                        socket.send_multipart([origin_frame, frame])
                case link.Submit(id="die"):
                    return 7
                case link.Submit(id="slow" | "hang" as name):  # a step that is within its limit, or beyond it
                    running_step = link.Running(3, 1024, 45.0, 600.0 if name == "slow" else 40.0)
                case link.Submit(id="go on" | "before"):
                    running_step = None
                case link.Submit(id=name, tokens=tokens):
                    running.append((origin, name, list(memoryview(tokens).cast("i")), 0))
        still: list[tuple[int, str, list[int], int]] = []
        for origin, name, ids, index in running:
            last = index == len(ids) - 1
            output = link.Output(name, index, [ids[index]], finish="length" if last else None)
            socket.send_multipart([origin.to_bytes(4, "little"), link.encoder.encode(link.Outputs([output]))])
            if not last:
                still.append((origin, name, ids, index + 1))
        running = still
        if bedtime is not None and not running:
            failure = "a transfer is still under way" if BEHAVIOUR == "cannot-sleep" else ""
            if not failure:
                level, asleep = bedtime.level, ["weights", "kv_cache"]
                say(status())
            say(engine.SleepState(bedtime.number, level, asleep, failure))
            bedtime = None
        if draining and not drained and not running and BEHAVIOUR != "never-drains":
            drained = True
            say(engine.Drained())
        if time.monotonic() >= status_due_s:
            status_due_s = time.monotonic() + 0.1
            pulse.send(engine.encoder.encode(engine.Beat(running_step)))
            if running_step is None:
                say(status())


if __name__ == "__main__":
    sys.exit(main())
