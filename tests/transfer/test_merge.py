from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.transfer.merge import count_runs, neighbours_together

pairs = st.lists(st.integers(0, 60), unique=True, max_size=40).flatmap(
    lambda remote: st.tuples(st.just(remote), st.permutations(range(len(remote))))
)


def arrays(remote: list[int], local: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(remote, dtype=np.int64), np.array(local, dtype=np.int64)


@given(pairs)
def test_same_pairs_ascending(pair: tuple[list[int], list[int]]) -> None:
    remote, local = arrays(*pair)
    theirs, ours = neighbours_together(remote, local)
    assert sorted(zip(theirs.tolist(), ours.tolist(), strict=True)) == sorted(zip(*pair, strict=True))
    assert (np.diff(theirs) > 0).all()


@given(pairs)
def test_runs_rebuild_the_list(pair: tuple[list[int], list[int]]) -> None:
    remote, local = neighbours_together(*arrays(*pair))
    runs: list[list[int]] = []
    for theirs, ours in zip(remote.tolist(), local.tolist(), strict=True):
        if runs and runs[-1][0] + runs[-1][2] == theirs and runs[-1][1] + runs[-1][2] == ours:
            runs[-1][2] += 1
        else:
            runs.append([theirs, ours, 1])
    assert count_runs(remote, local) == len(runs)


def test_descending_neighbours_become_one() -> None:
    remote, local = neighbours_together(*arrays([9, 8, 7, 6], [4, 3, 2, 1]))
    assert count_runs(remote, local) == 1


def test_only_both_ends_make_neighbours() -> None:
    assert count_runs(*arrays([1, 2, 3], [1, 2, 4])) == 2
    assert count_runs(*arrays([1, 2, 3], [3, 2, 1])) == 3
    assert count_runs(*arrays([], [])) == 0
