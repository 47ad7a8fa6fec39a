"""Falling asleep and waking: the order of things in the engine, and memory that really goes."""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from pd_serve.engine import core
from pd_serve.engine.batch import Batch
from pd_serve.engine.channel import Channel
from pd_serve.engine.core import Engine
from pd_serve.engine.presence import Presence
from pd_serve.engine.role import NoRole
from pd_serve.engine.runner import Runner
from pd_serve.engine.sampler import Sampler
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence
from pd_serve.engine.sleep import TAGS, HostSleeper
from pd_serve.errors import PDServeError
from pd_serve.kv.layout import KVLayout, LayerGroup
from pd_serve.kv.manager import KVManager
from pd_serve.memory.pool import HostPool
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.wire import engine as wire
from pd_serve.wire import link
from pd_serve.wire.memory import MemoryReport, TagUsage
from tests.engine.test_runner import batch

VOCAB = 64
MODEL = link.ModelInfo("m", "f00d", 100, VOCAB, [1])


class ScriptedRole(NoRole):
    """A role without peers. ``leases`` and ``pulling`` are the test's to set."""

    def __init__(self, epoch: int, said: list[str], lets_go: bool) -> None:
        super().__init__()
        self._epoch = epoch
        self._said = said
        self._lets_go = lets_go

    def submitted(self, seq: Sequence) -> link.Output | None:
        return None

    def computed(self, seq: Sequence, token: int | None) -> None:
        pass

    def counters(self) -> dict[str, float]:
        return {"handshakes": 1.0}

    def close(self) -> bool:
        self._said.append(f"close {self._epoch}")
        return super().close() and self._lets_go


class ScriptedSleeper:
    def __init__(self, said: list[str]) -> None:
        self._said = said
        self.asleep: list[str] = []
        self.broken = ""  # what fails

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


class Compute:
    """One token for each sequence and step, as soon as ``go`` is set."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.go = threading.Event()
        self.go.set()

    def execute(self, batch: Batch) -> torch.Tensor:
        assert self.go.wait(10)
        time.sleep(self.step_s)
        logits = torch.zeros(len(batch.logits_rows), VOCAB)
        logits[:, 7] = 1.0
        return logits


class Node:
    """An engine on a thread, and the node's end of its socket. Makes its roles, too."""

    def __init__(self, address: str) -> None:
        self.said: list[str] = []
        self.heard: list[wire.FromEngine] = []
        self.outputs: list[link.Output] = []
        self.role: ScriptedRole
        self.lets_go = True
        self.sleeper = ScriptedSleeper(self.said)
        self.compute = Compute()
        layout = KVLayout(4, "float32", (LayerGroup((0,), 1, 8),))
        self.kv = KVManager(layout, (64,), 128)
        self._opened = 0
        self._numbers = 0  # of orders; tests that number their own begin at 101
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.bind(address)
        self._channel = Channel(self._context, address)
        self.presence = Presence(self, self.open(), self.kv, self.sleeper)
        self._engine = Engine(
            kv=self.kv,
            scheduler=Scheduler(self.kv, Limits(8, 64, 1000, 100, 100)),
            runner=self.compute,
            sampler=Sampler(VOCAB, (1,)),
            presence=self.presence,
            channel=self._channel,
            eos_token_ids=(1,),
            vocab_size=VOCAB,
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
        return wire.EngineReady(MODEL, "l", "layout", epoch, f"tcp://{epoch}", "nixl", load, start_s)

    def tell(self, message: wire.ToEngine) -> None:
        self._socket.send_multipart([wire.NODE, wire.encoder.encode(message)])

    def submit(self, name: str, tokens: int, prompt: int = 20) -> None:
        data = array("i", range(2, 2 + prompt)).tobytes()
        message = link.Submit(name, data, 0, link.SamplingParams(max_tokens=tokens, seed=0, temperature=0))
        self._socket.send_multipart([(1).to_bytes(4, "little"), link.encoder.encode(message)])

    def listen(self, enough: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + 10
        while not enough():
            assert time.monotonic() < deadline_s, f"not seen: {what}; heard {self.heard[-5:]} {self.outputs[-5:]}"
            if self._socket.poll(20):
                origin, payload = self._socket.recv_multipart()
                if origin == wire.NODE:
                    self.heard.append(wire.decode_from_engine(payload))
                else:
                    outputs = link.decode_from_node(payload)
                    assert isinstance(outputs, link.Outputs)
                    self.outputs += outputs.items

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
        return [m for m in self.heard if isinstance(m, link.Status)][-1]

    def finished(self, name: str) -> None:
        self.listen(lambda: any(o.id == name and o.finish for o in self.outputs), f"the end of {name}")

    def close(self) -> None:
        self.compute.go.set()
        self.tell(wire.Shutdown())
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._engine.close()
        self._channel.close()
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(f"ipc://{tmp_path}/engine")
    yield node
    node.close()


def test_peers_lose_the_pool_before_its_memory_goes_and_find_another_epoch(node: Node) -> None:
    node.submit("a", 3)
    node.finished("a")
    assert node.sleep() == wire.SleepState(1, 1, list(TAGS))
    assert node.said == ["open 1", "close 1", "sleep 1"]
    assert node.status().load.draining
    assert node.status().memory == MemoryReport("test", {WEIGHTS: TagUsage(1, 2, 3)}, asleep=list(TAGS))
    usage = node.kv.usage()[0]
    assert (usage.used, usage.cached) == (0, 0)  # no prefix of what is gone
    assert node.wake() == wire.SleepState(2, 0, [])
    assert node.said[3:] == ["wake kv_cache", "open 2", "wake weights"]
    ready, state = node.heard[-3], node.heard[-1]
    assert isinstance(ready, wire.EngineReady) and isinstance(state, wire.SleepState)  # in this order
    assert (ready.epoch, ready.peer_address, ready.load.draining) == ("epoch-2", "tcp://epoch-2", False)
    assert {"kv_cache", "weights", "transfer"} == set(ready.start_s)
    assert node.status().counters["handshakes"] == 2.0  # of both roles: counters never fall
    assert node.status().counters["leaks"] == 0.0
    node.submit("b", 3)
    node.finished("b")
    assert next(o.num_cached for o in node.outputs if o.id == "b") == 0


def test_what_runs_may_end_and_nothing_new_comes_in(node: Node) -> None:
    node.compute.go.clear()
    node.submit("long", 20)
    node.tell(wire.Sleep(101, 1))
    node.submit("late", 3)
    node.compute.go.set()
    assert node.answer(101).level == 1
    node.finished("long")
    refused = [o for o in node.outputs if o.id == "late"]
    assert [o.failure.kind for o in refused if o.failure] == ["refused"]
    node.submit("asleep", 3)
    node.listen(lambda: any(o.id == "asleep" and o.failure for o in node.outputs), "a refusal")


def test_what_does_not_end_is_ended(node: Node) -> None:
    node.role.leases = 1
    node.compute.step_s = 0.03
    node.submit("long", 70)
    node.tell(wire.Sleep(101, 2))
    node.listen(lambda: node.heard and node.status().load.draining, "draining")
    node.listen(lambda: len(node.outputs) > 2, "tokens")
    assert node.answers(101) == []
    node.tell(wire.Sleep(101, 2, now=True))
    assert node.answer(101) == wire.SleepState(101, 2, list(TAGS))
    assert not any(o.finish for o in node.outputs)
    node.kv.check(idle=True)
    node.tell(wire.Sleep(101, 2, now=True))  # came too late
    assert node.wake().level == 0
    assert node.answers(101) == [wire.SleepState(101, 2, list(TAGS))]


def test_memory_that_a_transfer_writes_is_kept(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "TRANSFERS_END_S", 0.05)
    node.role.pulling = 2
    node.tell(wire.Sleep(101, 1))
    state = node.order(wire.Sleep(101, 1, now=True))
    assert (state.level, state.asleep) == (0, [])
    assert "2 transfers" in state.failure
    assert node.said == ["open 1"]
    node.submit("a", 3)
    node.finished("a")
    node.role.pulling = 0
    assert node.sleep().level == 1


def test_a_transport_that_does_not_let_go(node: Node) -> None:
    node.role._lets_go = False
    state = node.sleep()
    assert (state.level, state.asleep) == (0, [])
    assert "did not let go" in state.failure
    assert node.said == ["open 1", "close 1", "open 2"]
    assert node.epochs() == ["epoch-2"]  # the engine serves under it
    node.submit("a", 3)
    node.finished("a")


def test_a_sleeper_that_fails(node: Node) -> None:
    node.sleeper.broken = "sleep"
    state = node.sleep()
    assert (state.level, state.asleep, state.failure) == (0, [], "RuntimeError: no pinned memory")
    assert node.said == ["open 1", "close 1", "sleep 1", "wake kv_cache", "open 2", "wake weights"]
    node.submit("a", 3)
    node.finished("a")


def test_a_wake_that_fails_leaves_the_engine_asleep(node: Node) -> None:
    assert node.sleep(2).level == 2
    node.sleeper.broken = WEIGHTS
    state = node.wake()
    assert state == wire.SleepState(2, 2, list(TAGS), "the model's files are gone")
    assert node.said[3:] == ["wake kv_cache", "open 2", "close 2", "sleep 2"]
    assert node.epochs() == []
    node.sleeper.broken = ""
    assert node.wake().level == 0
    assert node.epochs() == ["epoch-3"]


def test_tag_by_tag(node: Node) -> None:
    assert node.sleep(2).level == 2
    assert node.wake(WEIGHTS) == wire.SleepState(2, 2, [KV_CACHE])
    assert node.wake(WEIGHTS) == wire.SleepState(3, 2, [KV_CACHE])
    assert node.epochs() == []
    assert node.wake(KV_CACHE) == wire.SleepState(4, 0, [])
    assert node.epochs() == ["epoch-2"]
    assert node.wake(KV_CACHE) == wire.SleepState(5, 0, [])  # awake already
    assert node.epochs() == ["epoch-2"]


def test_sleeping_twice_and_draining_asleep(node: Node) -> None:
    assert node.sleep() == wire.SleepState(1, 1, list(TAGS))
    assert node.sleep() == wire.SleepState(2, 1, list(TAGS))
    assert node.said.count("close 1") == 1
    node.tell(wire.Drain())
    node.listen(lambda: any(isinstance(m, wire.Drained) for m in node.heard), "drained")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_on_a_host_goes_and_comes_back(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | heads))
    model = ModelConfig.from_directory(tmp_path)
    layout = KVLayout(4, "float32", model.layer_groups())
    pool = HostPool(layout, (4000,))
    filled_bytes = pool.tensors()[0].fill_(1).nbytes
    addresses = pool.memory().regions

    def load() -> object:
        return load_decoder(tmp_path, model, "float32", "dummy")

    runner = Runner(load(), model, layout, pool.tensors(), 1)  # type: ignore[arg-type]
    before = runner.execute(batch(1, 0, 60))
    sleeper = HostSleeper(pool, runner, load)  # type: ignore[arg-type]
    weights, kv = sleeper.report().tags[WEIGHTS], sleeper.report().tags[KV_CACHE]
    assert weights.bytes > 2 * 32_000 * 256 * 4  # embedding and packed head
    assert weights.reserved_bytes == weights.bytes and kv.reserved_bytes == pool.size_bytes > 30 << 20

    full = resident_bytes()
    sleeper.sleep(1)
    assert sleeper.asleep == [KV_CACHE]
    assert full - resident_bytes() > 0.9 * filled_bytes
    assert sleeper.report().tags[KV_CACHE].reserved_bytes == 0
    assert sleeper.report().tags[WEIGHTS] == weights
    sleeper.sleep(2)  # deeper
    assert set(sleeper.asleep) == set(TAGS)
    assert full - resident_bytes() > 0.9 * (filled_bytes + weights.bytes)
    empty = sleeper.report().tags[WEIGHTS]
    assert (empty.bytes, empty.peak_bytes, empty.reserved_bytes) == (0, weights.bytes, 0)

    sleeper.wake([WEIGHTS])
    assert sleeper.asleep == [KV_CACHE]
    sleeper.wake(TAGS)
    assert sleeper.asleep == [] and sleeper.report().tags[WEIGHTS] == weights
    assert pool.memory().regions == addresses
    assert not pool.tensors()[0][: 1 << 20].any()
    np.testing.assert_array_equal(runner.execute(batch(1, 0, 60)).numpy(), before.numpy())
