"""A prefill engine's leases end with the router that asked for them."""

from __future__ import annotations

import numpy as np

from pd_serve.engine.scheduler import Limits, Scheduler
from pd_serve.engine.sequence import Sequence
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.kv.manager import KVManager
from pd_serve.prefill.sender import OutboxSender
from pd_serve.wire.link import SamplingParams


class NotedOutbox:
    """Notes what it is asked for; says nothing."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def open(self, key: str) -> None: ...

    def publish(self, *what: object) -> None: ...

    def cancel(self, key: str, why: str) -> None:
        self.cancelled.append(key)


def test_a_router_that_is_gone_leaves_no_lease() -> None:
    kv = KVManager(KVLayout(4, "float32", (kv_group((0,), 1, 8),)), (9,), 256)
    scheduler = Scheduler(kv, Limits(8, 64, 1000, 100, 10.0, 255))
    outbox = NotedOutbox()
    role = OutboxSender(kv, scheduler, outbox)  # type: ignore[arg-type]
    for name, origin in (("mine", 1), ("another's", 2)):
        tokens = np.arange(8, dtype=np.int32) + 100 * origin
        seq = Sequence(
            name, origin, tokens, 8, SamplingParams(max_tokens=4, seed=0), capacity=256, handoff=True, arrival_s=0.0
        )
        role.submitted(seq)
        scheduler.add(seq)
    for work in scheduler.plan() or ():
        scheduler.collected(work)
        role.computed(work.seq, 7)
    assert role.leases == 2
    role.dropped(1)
    assert (role.leases, outbox.cancelled) == (1, ["mine"])
    role.dropped(2)
    assert role.leases == 0 and kv.usage()[0].used == 0
