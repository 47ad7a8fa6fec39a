"""An engine's ability to send: what it announces and when, and that every way out gives the blocks back."""

from __future__ import annotations

import numpy as np

from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.prefill.outbox import LeaseEnded
from pd_serve.prefill.sender import OutboxSender
from pd_serve.wire.link import Output, SamplingParams
from pd_serve.wire.peer import Blocks

FIRST_TOKEN = 7


class NotedOutbox:
    """Notes what it is asked for; says what the test puts into it."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.published: list[tuple[str, int, list[Blocks], int | None]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.coming: list[LeaseEnded] = []

    def open(self, key: str) -> None:
        self.opened.append(key)

    def publish(self, key: str, num_tokens: int, blocks: list[Blocks], token: int | None) -> None:
        self.published.append((key, num_tokens, blocks, token))

    def cancel(self, key: str, why: str) -> None:
        self.cancelled.append((key, why))

    def events(self) -> list[LeaseEnded]:
        coming, self.coming = self.coming, []
        return coming


class Prefill:
    """Blocks of 4 tokens, 8 tokens a step; the second group of layers sees 8 tokens."""

    def __init__(self, *groups: int | None) -> None:
        layers = tuple(kv_group((place,), 1, 8, window) for place, window in enumerate(groups or (None,)))
        self.kv = KVManager(KVLayout(4, "float32", layers), (17,) * len(layers), 256)
        self.scheduler = Scheduler(self.kv, Limits(8, 8, 1000, 100, 10.0, 255))
        self.outbox = NotedOutbox()
        self.sender = OutboxSender(self.kv, self.scheduler, self.outbox)  # type: ignore[arg-type]

    def submit(self, name: str, num_tokens: int, origin: int = 1) -> Sequence:
        tokens = np.arange(num_tokens, dtype=np.int32) + sum(name.encode())
        params = SamplingParams(max_tokens=4, seed=0)
        seq = Sequence(name, origin, tokens, num_tokens, params, capacity=256, handoff=True, arrival_s=0.0)
        self.sender.submitted(seq)
        self.scheduler.add(seq)
        return seq

    def step(self) -> None:
        for work in self.scheduler.plan() or ():
            self.scheduler.collected(work)
            self.sender.computed(work.seq, FIRST_TOKEN if work.samples else None)

    def finish(self, *seqs: Sequence) -> None:
        while any(seq.state is not State.FINISHED for seq in seqs):
            self.step()

    def ends(self, key: str, why: str = "released") -> list[tuple[Sequence, Output]]:
        self.outbox.coming.append(LeaseEnded(key, why))
        return list(self.sender.events())

    def used(self) -> list[int]:
        return [usage.used for usage in self.kv.usage()]


def test_blocks_are_announced_as_they_are_full_and_the_last_one_with_the_first_token() -> None:
    p = Prefill()
    seq = p.submit("k", 18)
    assert p.outbox.opened == ["k"] and seq.state is State.WAITING
    p.finish(seq)
    announced = [(n, [(b.first, len(b.ids) // 4) for b in blocks], t) for _, n, blocks, t in p.outbox.published]
    assert announced == [(8, [(0, 2)], None), (16, [(2, 2)], None), (18, [(4, 1)], FIRST_TOKEN)]
    ids = np.frombuffer(b"".join(blocks[0].ids for _, _, blocks, _ in p.outbox.published), "<i4")
    assert len(set(ids)) == 5 and 0 not in ids
    assert p.sender.leases == 1 and seq.blocks is None, "the blocks are the lease's"
    assert p.used() == [5]


def test_a_layer_that_sees_less_announces_only_what_later_tokens_see() -> None:
    p = Prefill(None, 8)
    p.finish(p.submit("k", 40))
    first = p.kv.layout.first_live_block(1, 40)
    assert first > 0
    seen: dict[int, list[int]] = {0: [], 1: []}
    for _, _, blocks, _ in p.outbox.published:
        for part in blocks:
            seen[part.group] += range(part.first, part.first + len(part.ids) // 4)
    assert seen == {0: list(range(10)), 1: list(range(first, 10))}


def test_a_lease_that_ends_gives_its_blocks_back_and_nobody_hears_of_it() -> None:
    p = Prefill()
    p.finish(p.submit("k", 18))
    assert p.ends("k") == [] and p.ends("k", "expired") == [], "the second time it is unknown"
    assert p.sender.leases == 0 and p.used() == [0]
    assert p.kv.usage()[0].cached, "another prompt may begin like it"


def test_a_decode_node_that_leaves_before_the_prompt_is_computed_ends_it() -> None:
    p = Prefill()
    seq = p.submit("k", 18)
    p.step()
    ((told, output),) = p.ends("k", "peer_lost")
    assert told is seq and seq.state is State.FINISHED
    assert output.failure is not None and output.failure.kind == "transfer" and "peer_lost" in output.failure.message
    assert p.used() == [0] and not p.scheduler.plan() and not p.outbox.cancelled


def test_what_ends_here_is_cancelled_there() -> None:
    p = Prefill()
    for name, computed in (("waiting", False), ("leased", True)):
        seq = p.submit(name, 8)
        if computed:
            p.finish(seq)
            p.sender.abandoned(name)
        else:
            p.scheduler.remove(seq)
            p.sender.ended(seq, "aborted")
        p.sender.abandoned(name)
    assert p.outbox.cancelled == [("waiting", "aborted"), ("leased", "aborted")], "each once"
    assert p.sender.leases == 0 and p.used() == [0]
    assert p.ends("leased") == [], "its word was on the way"


def test_a_router_that_is_gone_leaves_no_lease() -> None:
    p = Prefill()
    p.finish(p.submit("mine", 8, origin=1), p.submit("another's", 8, origin=2))
    assert p.sender.leases == 2
    p.sender.dropped(1)
    assert (p.sender.leases, p.outbox.cancelled) == (1, [("mine", "aborted")])
    p.sender.dropped(2)
    assert p.sender.leases == 0 and p.used() == [0]
