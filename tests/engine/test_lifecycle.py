"""Falling asleep and waking: the order of things in the engine, and memory that really goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.executor import LocalExecutor
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.cpu.sampler import Sampler
from pd_serve.compute.executor import TAGS
from pd_serve.engine import lifecycle
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pool import HostPool
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.wire import engine as wire
from pd_serve.wire.memory import MemoryReport, TagUsage
from tests.compute.cpu.test_runner import step
from tests.engine.harness import Node


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
    assert (ready.epoch, ready.peer_addresses, ready.load.draining) == ("epoch-2", ("tcp://epoch-2",), False)
    assert {"kv_cache", "weights", "transfer"} == set(ready.start_s)
    assert node.status().counters["handshakes"] == 2.0  # of both roles: counters never fall
    assert node.status().counters["leaks"] == 0.0
    node.submit("b", 3)
    node.finished("b")
    assert next(o.num_cached for o in node.outputs if o.id == "b") == 0


def test_what_runs_may_end_and_nothing_new_comes_in(node: Node) -> None:
    node.executor.go.clear()
    node.submit("long", 20)
    node.tell(wire.Sleep(101, 1))
    node.submit("late", 3)
    node.executor.go.set()
    assert node.answer(101).level == 1
    node.finished("long")
    refused = [o for o in node.outputs if o.id == "late"]
    assert [o.failure.kind for o in refused if o.failure] == ["refused"]
    node.submit("asleep", 3)
    node.listen(lambda: any(o.id == "asleep" and o.failure for o in node.outputs), "a refusal")


def test_what_does_not_end_is_ended(node: Node) -> None:
    node.role.leases = 1
    node.executor.step_s = 0.03
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
    monkeypatch.setattr(lifecycle, "TRANSFERS_END_S", 0.05)
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
    node.executor.broken = "sleep"
    state = node.sleep()
    assert (state.level, state.asleep, state.failure) == (0, [], "RuntimeError: no pinned memory")
    assert node.said == ["open 1", "close 1", "sleep 1", "wake kv_cache", "open 2", "wake weights"]
    node.submit("a", 3)
    node.finished("a")


def test_a_wake_that_fails_leaves_the_engine_asleep(node: Node) -> None:
    assert node.sleep(2).level == 2
    node.executor.broken = WEIGHTS
    state = node.wake()
    assert state == wire.SleepState(2, 2, list(TAGS), "the model's files are gone")
    assert node.said[3:] == ["wake kv_cache", "open 2", "close 2", "sleep 2"]
    assert node.epochs() == []
    node.executor.broken = ""
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
        return load_decoder(tmp_path, model, "float32", "dummy", ops=ops)

    runner = Runner(None, model, layout, pool.tensors(), 1)
    executor = LocalExecutor(pool, runner, Sampler(model.vocab_size), load)  # type: ignore[arg-type]
    assert executor.asleep == [WEIGHTS]
    executor.load()
    before = runner.execute(step(1, 0, 60))
    weights, kv = executor.report().tags[WEIGHTS], executor.report().tags[KV_CACHE]
    assert weights.bytes > 2 * 32_000 * 256 * 4  # embedding and packed head
    assert weights.reserved_bytes == weights.bytes and kv.reserved_bytes == pool.size_bytes > 30 << 20

    full = resident_bytes()
    executor.sleep(1)
    assert executor.asleep == [KV_CACHE]
    assert full - resident_bytes() > 0.9 * filled_bytes
    assert executor.report().tags[KV_CACHE].reserved_bytes == 0
    assert executor.report().tags[WEIGHTS] == weights
    executor.sleep(2)  # deeper
    assert set(executor.asleep) == set(TAGS)
    assert full - resident_bytes() > 0.9 * (filled_bytes + weights.bytes)
    empty = executor.report().tags[WEIGHTS]
    assert (empty.bytes, empty.peak_bytes, empty.reserved_bytes) == (0, weights.bytes, 0)

    executor.wake([WEIGHTS])
    assert executor.asleep == [KV_CACHE]
    executor.wake(TAGS)
    assert executor.asleep == [] and executor.report().tags[WEIGHTS] == weights
    assert pool.memory().regions == addresses
    assert not pool.tensors()[0][: 1 << 20].any()
    np.testing.assert_array_equal(runner.execute(step(1, 0, 60)).numpy(), before.numpy())
