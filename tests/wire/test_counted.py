"""Histograms that travel as counters."""

from __future__ import annotations

from collections import Counter

from pd_serve.wire.counted import BOUNDS_S, TRANSFER, counted_metrics, no_times, observe


def test_a_histogram_of_two_ranks_is_cumulative_and_keeps_its_sum() -> None:
    ranks = [no_times(TRANSFER) for _ in range(2)]
    observe(ranks[0], TRANSFER, BOUNDS_S[0])  # a bound is its bucket's own
    observe(ranks[0], TRANSFER, 1000.0)
    observe(ranks[1], TRANSFER, BOUNDS_S[0] * 1.01)
    total: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank)
    families = {family.name: family for family in counted_metrics("x_", ["node"], [(["a"], {"steps": 3.0, **total})])}
    samples = {(s.name, s.labels.get("le")): s.value for s in families["x_" + TRANSFER].samples}
    assert samples[f"x_{TRANSFER}_bucket", str(BOUNDS_S[0])] == 1
    assert samples[f"x_{TRANSFER}_bucket", str(BOUNDS_S[1])] == samples[f"x_{TRANSFER}_bucket", str(BOUNDS_S[-1])] == 2
    assert samples[f"x_{TRANSFER}_bucket", "+Inf"] == samples[f"x_{TRANSFER}_count", None] == 3
    assert abs(samples[f"x_{TRANSFER}_sum", None] - 1000 - 2.01 * BOUNDS_S[0]) < 1e-9
    assert [s.value for s in families["x_steps"].samples] == [3.0]
    assert not any(":" in name for name in families)
