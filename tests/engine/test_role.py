"""Both abilities of an engine on one transfer thread: two engines send to and receive from each other at once."""

from __future__ import annotations

import select
from collections.abc import Iterator

import numpy as np
import pytest

from pd_serve.decode import receiver
from pd_serve.decode.inbox import Inbox
from pd_serve.decode.receiver import InboxReceiver
from pd_serve.engine.role import Role
from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.manager import KVManager
from pd_serve.prefill.outbox import Outbox
from pd_serve.prefill.sender import OutboxSender
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Output, SamplingParams, Source
from tests.transfer.harness import LARGE, Pool, identity, nixl_lanes, until

PROMPT, BLOCKS = 40, 32


class Engine:
    """What an engine has but for the model: "computing" writes random bytes."""

    def __init__(self, name: str, seed: int) -> None:
        self.pool = Pool(LARGE, BLOCKS, seed)
        self.kv = KVManager(LARGE, (BLOCKS,), 256)
        self.scheduler = Scheduler(self.kv, Limits(8, 64, 1000, 100, 10.0, 255))
        self.me = identity(name, LARGE)
        self.worker = TransferWorker(nixl_lanes(self.pool.memory()))
        outbox = Outbox(self.me, self.worker, host="127.0.0.1", lease_s=30.0)
        inbox = Inbox(self.me, self.worker, pull_timeout_s=30.0)
        self.worker.start()
        sender = OutboxSender(self.kv, self.scheduler, outbox)
        self.role = Role(self.worker, sender, InboxReceiver(self.kv, self.scheduler, inbox, 0))
        self.role.wait_ready(30)
        self.source = Source(name, self.me.epoch, self.role.listen(10))
        self.said: list[tuple[str, Output]] = []
        self.seqs: dict[str, Sequence] = {}
        self.computed: dict[str, bytes] = {}  # what is in the blocks of what was computed here

    def submit(
        self, name: str, *, handoff: bool = False, source: Source | None = None, length: int = PROMPT
    ) -> Sequence:
        tokens = np.random.default_rng([*name.encode()]).integers(0, 1 << 30, length, dtype=np.int32)
        params = SamplingParams(max_tokens=4, seed=0)
        seq = Sequence(name, 1, tokens, length, params, capacity=length + 8, handoff=handoff, source=source)
        self.seqs[name] = seq
        self.role.submitted(seq)
        if seq.state is State.WAITING:
            self.scheduler.add(seq)
        return seq

    def turn(self) -> None:
        self.said += [(seq.id, output) for seq, output in self.role.events()]
        for work in self.scheduler.plan() or ():
            samples = work.samples
            self.computed[work.seq.id] = self.bytes_of(work.seq)
            self.scheduler.collected(work)
            self.role.computed(work.seq, 7 if samples else None)

    def bytes_of(self, seq: Sequence) -> bytes:
        assert seq.blocks is not None
        return self.pool.groups[0][seq.blocks.tables[0][: seq.blocks.num_blocks]].tobytes()

    def arrived(self, name: str) -> bool:
        return any(id == name and output.event == "arrived" for id, output in self.said)

    def close(self) -> None:
        assert self.role.close()
        assert self.role.counters()["transfer_faults"] == 0


@pytest.fixture
def engines() -> Iterator[tuple[Engine, Engine]]:
    a, b = Engine("A", 1), Engine("B", 2)
    yield a, b
    a.close()
    b.close()


def test_two_engines_send_to_each_other_at_once(engines: tuple[Engine, Engine]) -> None:
    a, b = engines
    for here, there in ((a, b), (b, a)):
        key = f"from {here.me.node_id}"
        seq = here.submit(key, handoff=True)
        there.submit(key, source=here.source)
        here.turn()
        assert here.role.leases == 1 and seq.state is State.FINISHED

    def both() -> bool:
        a.turn()
        b.turn()
        return a.arrived("from B") and b.arrived("from A")

    until(both)
    for here, there in ((a, b), (b, a)):
        key = f"from {there.me.node_id}"
        assert here.bytes_of(here.seqs[key]) == there.computed[key]
    until(lambda: (a.turn(), b.turn(), a.role.leases + b.role.leases == 0)[-1])
    assert a.role.counters()["handshakes"] == 2, "one as a source, one as a reader"


def test_nodes_full_of_leases_for_each_other_do_not_wait_for_ever(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "STUCK_S", 0.2)
    names = [f"{here.me.node_id}{number}" for here in engines for number in range(3)]
    for here in engines:
        for name in [name for name in names if name.startswith(here.me.node_id)]:
            here.submit(name, handoff=True, length=160)  # 10 blocks of 31
            until(lambda here=here, name=name: (here.turn(), here.seqs[name].state is State.FINISHED)[-1])
        assert here.role.leases == 3
    for here, there in (engines, engines[::-1]):
        for name in [name for name in names if name.startswith(here.me.node_id)]:
            there.submit(name, source=here.source, length=160)

    def ended() -> bool:
        for engine in engines:
            engine.turn()
            for seq in [s for s in engine.scheduler.running if not s.handoff]:
                engine.scheduler.remove(seq)  # it has been decoded
        said = {id for engine in engines for id, output in engine.said if output.failure or output.event == "arrived"}
        return said >= {*names} and not any(engine.role.leases + engine.role.pulling for engine in engines)

    until(ended)
    failed = [output.failure for engine in engines for _, output in engine.said if output.failure]
    assert 1 <= len(failed) < len(names) and all("took all of the room" in failure.message for failure in failed)


def test_one_descriptor_wakes_for_either_ability(engines: tuple[Engine, Engine]) -> None:
    a, b = engines
    poll = select.poll()
    poll.register(a.role.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    b.submit("k", handoff=True)
    a.submit("k", source=b.source)
    b.turn()
    assert poll.poll(10_000), "the receiver has news"
    until(lambda: (a.turn(), a.arrived("k"))[-1])
    gone = a.submit("gone", handoff=True)
    a.turn()
    assert gone.state is State.FINISHED and poll.poll(0) == []
    b.submit("gone", source=a.source)
    until(lambda: (b.turn(), b.arrived("gone"))[-1])
    assert poll.poll(10_000), "the sender has news"
    until(lambda: (a.turn(), a.role.leases == 0)[-1])


def test_an_engine_that_sleeps_has_neither(engines: tuple[Engine, Engine]) -> None:
    none = Role()
    assert list(none.events()) == [] and none.counters() == {} and none.listen(0) == ()
    assert (none.leases, none.pulling, none.queued, none.transport) == (0, 0, 0, "")
    assert not select.select([none.fileno()], [], [], 0)[0]
    assert none.close()
