"""An engine on a thread, with a role and an executor that do as they are told, and the node's end of it all."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection

import zmq

from pd_serve.compute.executor import TAGS
from pd_serve.compute.step import Sampled, Step
from pd_serve.engine.channel import Channel
from pd_serve.engine.core import Engine
from pd_serve.engine.lifecycle import Lifecycle
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.role import Role
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.errors import PDServeError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.memory.region import PoolMemory
from pd_serve.memory.usage import WEIGHTS
from pd_serve.wire import engine as wire
from pd_serve.wire import link
from pd_serve.wire.memory import MemoryReport, TagUsage

VOCAB = 64
MODEL = link.ModelInfo("m", "f00d", 100, VOCAB, [1])


class ScriptedRole(Role):
    """A role without peers. ``leases`` and ``pulling`` are the test's to set."""

    leases = pulling = 0  # type: ignore[assignment]

    def __init__(self, epoch: int, said: list[str], lets_go: bool) -> None:
        super().__init__()
        self._epoch = epoch
        self._said = said
        self._lets_go = lets_go

    def counters(self) -> dict[str, float]:
        return {"handshakes": 1.0}

    def close(self) -> bool:
        self._said.append(f"close {self._epoch}")
        return super().close() and self._lets_go


class ScriptedExecutor:
    """One token for each sequence and step, as soon as ``go`` is set."""

    depth = 0

    def __init__(self, said: list[str]) -> None:
        self._said = said
        self.asleep: list[str] = []
        self.broken = ""  # what fails
        self.step_s = 0.0
        self.poison = -1  # a token that no step with it can be computed
        self.go = threading.Event()
        self.go.set()

    def launch(self, step: Step) -> Sampled:
        assert self.go.wait(10)
        time.sleep(self.step_s)
        if self.poison in step.tokens:
            raise RuntimeError("poisoned")
        return Sampled([7] * len(step.sampled_rows), [None] * len(step.sampled_rows), [])

    def collect(self, launched: Sampled) -> Sampled:
        return launched

    def done(self, launched: Sampled) -> bool:
        return True

    def memory(self) -> list[PoolMemory]:
        raise AssertionError("roles here have no peers")

    def load(self) -> None:
        raise AssertionError("an engine is given an executor that is loaded")

    warm_up = load

    def sleep(self, level: int) -> None:
        self._said.append(f"sleep {level}")
        self.asleep = list(TAGS)
        if self.broken == "sleep":
            self.broken = ""
            raise RuntimeError("no pinned memory")

    def wake(self, tags: Collection[str]) -> None:
        if self.broken in tags:
            raise PDServeError("the model's files are gone")
        self._said += [f"wake {tag}" for tag in tags]
        self.asleep = [tag for tag in self.asleep if tag not in tags]

    def report(self) -> MemoryReport:
        return MemoryReport("test", {WEIGHTS: TagUsage(1, 2, 3)}, asleep=self.asleep)

    def close(self) -> None:
        self._said.append("end")


class DeviceExecutor(ScriptedExecutor):
    """Steps run one after the other by themselves, each for ``step_s``."""

    depth = 1

    def __init__(self, said: list[str]) -> None:
        super().__init__(said)
        self._ends_s = 0.0  # of all that is launched
        self._ends: deque[float] = deque()

    def launch(self, step: Step) -> Sampled:
        self._ends_s = max(self._ends_s, time.monotonic()) + self.step_s
        self._ends.append(self._ends_s)
        return Sampled([7] * len(step.sampled_rows), [None] * len(step.sampled_rows), [])

    def done(self, launched: Sampled) -> bool:
        return time.monotonic() >= self._ends[0]

    def collect(self, launched: Sampled) -> Sampled:
        time.sleep(max(0.0, self._ends.popleft() - time.monotonic()))
        return launched


class Node:
    """An engine on a thread, and the node's end of its socket. Makes its roles, too."""

    lets_in = False

    def __init__(
        self, address: str, executor: type[ScriptedExecutor] = ScriptedExecutor, status_interval_s: float = 1.0
    ) -> None:
        self.said: list[str] = []
        self.heard: list[wire.FromEngine] = []
        self.outputs: list[link.Output] = []
        self.prefixes: list[tuple[int, link.Prefixes]] = []  # by router
        self.role: ScriptedRole
        self.lets_go = True
        self.executor = executor(self.said)
        layout = KVLayout(4, "float32", (kv_group((0,), 1, 8),))
        self.kv = KVManager(layout, (64,), 128)
        self._opened = 0
        self._numbers = 0  # of orders; tests that number their own begin at 101
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.bind(address)
        self._channel = Channel(self._context, address)
        self._beats: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._beats.bind(f"{address}-pulse")
        self._pulse = Pulse(self._context, f"{address}-pulse", engine_timeout_s=0.1, step_timeout_s=0.2)
        self._pulse.start()
        lifecycle = Lifecycle(self, self.open(), self.kv, self.executor, self._pulse)
        self._engine = Engine(
            kv=self.kv,
            scheduler=Scheduler(self.kv, Limits(8, 64, 1000, 100, 10.0, 100)),
            executor=self.executor,
            lifecycle=lifecycle,
            channel=self._channel,
            pulse=self._pulse,
            eos_token_ids=(1,),
            vocab_size=VOCAB,
            status_interval_s=status_interval_s,
        )
        self._thread = threading.Thread(target=self._engine.run)
        self._thread.start()

    def open(self) -> ScriptedRole:
        self._opened += 1
        self.said.append(f"open {self._opened}")
        self.role = ScriptedRole(self._opened, self.said, self.lets_go)
        return self.role

    def introduce(self, role: object, load: link.Load, start_s: dict[str, float]) -> wire.EngineReady:
        epoch = f"epoch-{self._opened}"
        return wire.EngineReady(MODEL, "l", "layout", epoch, (f"tcp://{epoch}",), "nixl", load, start_s)

    def tell(self, message: wire.ToEngine) -> None:
        self._socket.send_multipart([wire.NODE, wire.encoder.encode(message)])

    def submit(self, name: str, tokens: int, prompt: int = 20, *, number: int = 0, **sampling: object) -> None:
        data = array("i", range(2, 2 + prompt)).tobytes()
        params = link.SamplingParams(**{"max_tokens": tokens, "seed": 0, "temperature": 0} | sampling)  # type: ignore[arg-type]
        self.say(link.Submit(name, data, 0, params, number=number))

    def say(self, message: link.ToNode, origin: int = 1) -> None:
        """As a router."""
        self._socket.send_multipart([origin.to_bytes(4, "little"), link.encoder.encode(message)])

    def beat(self) -> wire.Beat:
        """The next of the pulse."""
        assert self._beats.poll(5000)
        return wire.decode_beat(self._beats.recv())

    def output(self, name: str) -> link.Output:
        """The first for this attempt."""
        self.listen(lambda: any(o.id == name for o in self.outputs), f"an output for {name}")
        return next(o for o in self.outputs if o.id == name)

    def listen(self, enough: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + 10
        while not enough():
            assert time.monotonic() < deadline_s, f"not seen: {what}; heard {self.heard[-5:]} {self.outputs[-5:]}"
            if self._socket.poll(20):
                origin, payload = self._socket.recv_multipart()
                if origin == wire.NODE:
                    self.heard.append(wire.decode_from_engine(payload))
                else:
                    message = link.decode_from_node(payload)
                    if isinstance(message, link.Prefixes):
                        self.prefixes.append((int.from_bytes(origin, "little"), message))
                        continue
                    assert isinstance(message, link.Outputs)
                    self.outputs += message.items

    def order(self, message: wire.Sleep | wire.Wake) -> wire.SleepState:
        """Sends it and waits for its answer."""
        self.tell(message)
        return self.answer(message.number)

    def sleep(self, level: int = 1) -> wire.SleepState:
        self._numbers += 1
        return self.order(wire.Sleep(self._numbers, level))

    def wake(self, *tags: str) -> wire.SleepState:
        self._numbers += 1
        return self.order(wire.Wake(self._numbers, list(tags or TAGS)))

    def answers(self, number: int) -> list[wire.SleepState]:
        return [m for m in self.heard if isinstance(m, wire.SleepState) and m.number == number]

    def answer(self, number: int) -> wire.SleepState:
        self.listen(lambda: self.answers(number), f"the answer to order {number}")
        return self.answers(number)[0]

    def epochs(self) -> list[str]:
        return [m.epoch for m in self.heard if isinstance(m, wire.EngineReady)]

    def status(self) -> link.Status:
        return [m.status for m in self.heard if isinstance(m, wire.Report)][-1]

    def finished(self, name: str) -> None:
        self.listen(lambda: any(o.id == name and o.finish for o in self.outputs), f"the end of {name}")

    def close(self) -> None:
        self.executor.go.set()
        self.tell(wire.Shutdown())
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._engine.close()
        assert self.said[-1] == "end"
        self._channel.close()
        self._pulse.close()
        self._beats.close(0)
        self._socket.close(0)
        self._context.term()
