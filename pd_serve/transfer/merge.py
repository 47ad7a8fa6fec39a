"""Arithmetic on block lists: how to name them so that neighbours are read as one.

Pure functions of numpy arrays, called by the transports for every pull; they never touch memory.
A transfer's cost grows with its number of descriptors (7 µs each over NVLink, see the design's facts),
so blocks that are neighbours on both ends should become one descriptor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

# Longer lists of smaller pieces are left as they are: bringing neighbours together costs more than it gains.
SORTED_FROM_BYTES = 128 << 10
SHORT = 2048


def neighbours_together(remote: I64, local: I64) -> tuple[I64, I64]:
    """The same pairs in ascending order of ``remote``: whatever can merge then stands side by side.

    Block pools hand out blocks in any order, descending runs included; which pair is read first does
    not matter to the reader.
    """
    if len(remote) < 2 or bool((remote[1:] > remote[:-1]).all()):
        return remote, local
    order = np.argsort(remote)  # not the stable one: a third of the time
    return remote[order], local[order]


def count_runs(remote: I64, local: I64) -> int:
    """Descriptors that are left when pairs next to each other merge: both ends must advance by one block."""
    if len(remote) == 0:
        return 0
    return 1 + int(np.count_nonzero((remote[1:] - remote[:-1] != 1) | (local[1:] - local[:-1] != 1)))
