"""What a pull of 1,000 blocks costs the transfer thread in Python, without the copy itself: the aim is 150 µs.

    python -m benchmarks.pull_cost

The nvlink transport over memory that a test driver maps (memfd), and a mover that copies nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import Region
from pd_serve.transfer.base import BlockMap, PullState
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.nvlink import NvlinkTransport
from tests.memory.memfd import MemfdDriver
from tests.transfer.nvlink_ends import Link, NumpyMover, Pool, pair_of

BLOCKS, REPEATS = 1000, 400


class Done:
    def done(self) -> bool:
        return True


class NoMover(NumpyMover):
    def copy(self, items: list[tuple[Rows, Rows]]) -> Done:  # type: ignore[override]
        return Done()


def layout(block_size: int, block_kib: int) -> KVLayout:
    return KVLayout(block_size, "bfloat16", (kv_group(tuple(range(block_kib // 4 * 16 // block_size)), 1, 64),))


def main() -> None:
    rng = np.random.default_rng(1)
    for what, theirs, ours in (
        ("blocks of 16 KiB, scattered", layout(16, 16), layout(16, 16)),
        ("blocks of 128 KiB, scattered", layout(16, 128), layout(16, 128)),
        ("16 to 64 tokens, scattered", layout(16, 16), layout(64, 64)),
    ):
        with tempfile.TemporaryDirectory() as directory:
            ends = []
            for kv in (theirs, ours):
                driver = MemfdDriver()
                pool = Pool(driver, kv, 2 * BLOCKS)
                transport = NvlinkTransport(driver, NoMover(), Path(directory))
                transport.register(pool.memory())
                ends.append((pool, transport))
            (source, there), (reader, here) = ends
            regions: list[Region] = list(reader.regions)
            link = Link(here, there, pair_of(theirs, list(source.regions), ours, regions)).pump()
            seconds = []
            for _ in range(REPEATS):
                remote, local = (rng.permutation(2 * BLOCKS - 1)[:BLOCKS].astype(np.int64) for _ in range(2))
                start = time.perf_counter()
                pull = here.pull(link.peer, [BlockMap(0, remote, local)])
                while pull.poll() is PullState.RUNNING:
                    here.progress()
                assert pull.poll() is PullState.DONE and pull.close()
                seconds.append(time.perf_counter() - start)
            link.close()
            there.close()
            here.close()
        print(f"RESULT {BLOCKS} {what}: {statistics.median(seconds[20:]) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
