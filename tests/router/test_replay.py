"""A public trace through the router's own placement: what knowing prefixes is worth, and what two routers lose."""

from __future__ import annotations

import random

import pytest

from tests.router.replay import Request, replay, trace


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    random.seed(1)


@pytest.mark.parametrize("num_nodes", [5, 8])
def test_knowing_prefixes_pays(num_nodes: int) -> None:
    requests = trace()
    blind = replay(requests, num_nodes, by_prefix=False)
    known = replay(requests, num_nodes, by_prefix=True)
    assert known.hit_rate >= 0.20 > blind.hit_rate
    assert known.mean_s <= 0.85 * blind.mean_s
    assert known.at(0.99) <= blind.at(0.99)
    assert max(known.placed) < 1.3 * min(known.placed)


@pytest.mark.parametrize("by_prefix", [False, True])
def test_two_routers_over_the_same_nodes_do_about_as_well_as_one(by_prefix: bool) -> None:
    # the trace's times are rounded to 3 s: what comes at the same moment nobody could know of
    requests = sorted(one._replace(arrival_s=one.arrival_s + 3 * random.random()) for one in trace()[:2000])
    one, two = (replay(requests, 8, by_prefix=by_prefix, routers=routers) for routers in (1, 2))
    assert two.mean_s < 1.2 * one.mean_s and two.at(0.99) < 1.2 * one.at(0.99)


def test_a_burst_of_equal_prompts_does_not_land_on_one_node() -> None:
    """Whoever got the first of them has not computed it yet: the others would wait, or compute it, too."""
    burst = [Request(10.0, 8192, list(range(1, 17))) for _ in range(64)]
    found = replay(burst, 8, by_prefix=True)
    assert max(found.placed) <= 16, found.placed
    # Where one node has it already, it is the best until its steps and transfers take as long as computing it again.
    found = replay([burst[0]._replace(arrival_s=0.0), *burst], 8, by_prefix=True)
    assert max(found.placed) < 64, found.placed
