"""UCX as the lane of real nodes: handshake, self-test, pulls, and a prefill node that dies."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Failed, Offered
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.lanes import Lanes
from tests.transfer.harness import LARGE, DecodeEnd, PrefillEnd, agent_name, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ucxx") is None, reason="pd-serve[ucx] is not installed")]


def ucx_lanes(memory: PoolMemory) -> Lanes:
    return lanes_for("ucx", agent_name("u"), memory, reads_only=False)


def test_prompts_between_two_nodes() -> None:
    p, d = PrefillEnd(LARGE, 200, lanes=ucx_lanes), DecodeEnd(LARGE, 200, lanes=ucx_lanes)
    rng = np.random.default_rng(0)
    order, places = rng.permutation(np.arange(1, 200)), rng.permutation(np.arange(1, 200))
    for prompt in range(3):
        key, part = f"k{prompt}", slice(60 * prompt, 60 * prompt + 60)
        d.inbox.expect(key, p.source)
        p.outbox.open(key)
        p.publish(key, 60 * LARGE.block_size, [order[part].tolist()], token=prompt)
        d.wait(key, Offered)
        d.accept(key, [places[part].tolist()])
        assert d.wait(key, Arrived).first_token == prompt
        assert until(lambda key=key: p.why(key)) == "released"
        assert np.array_equal(d.pool.groups[0][places[part]], p.pool.groups[0][order[part]])
    assert d.worker.internal_errors == p.worker.internal_errors == 0
    p.close()
    d.close()


def test_a_node_that_leaves_in_mid_pull() -> None:
    p, d = PrefillEnd(LARGE, 200, lanes=ucx_lanes), DecodeEnd(LARGE, 200, lanes=ucx_lanes)
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 190 * LARGE.block_size, [list(range(1, 191))], token=1)
    d.wait("k", Offered)
    d.accept("k", [list(range(190, 0, -1))])
    p.close()
    until(lambda: d.find("k", Failed) or d.find("k", Arrived))
    d.close()
