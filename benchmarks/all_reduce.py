"""Sums of activations over the GPUs of one host, in CUDA graphs: NCCL beside two-shot over symmetric memory.

    python benchmarks/all_reduce.py [--ranks 2] [--width 4096] [--rows 8192]

Rows x width, bfloat16; microseconds of one sum in a graph of 64, of the slowest rank, median of nine. What is printed
is what an engine would choose by. Prints lines that begin with RESULT.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch

from pd_serve.distributed.all_reduce import choose
from pd_serve.distributed.group import Group


def rank_main(directory: Path, rank: int, size: int, width: int, rows: int) -> None:
    group = Group(directory, rank, size, torch.device("cuda", rank))
    timed = choose(group, rows, width, torch.bfloat16, cache=directory / "cache")
    if rank == 0:
        for t in timed:
            print(f"RESULT all_reduce {t.rows} x {width}: NCCL {t.library_us:.1f} us, chosen {t.way} {t.us:.1f} us")
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8192)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="pd-ranks-") as directory:
        ranks = [
            spawn.Process(target=rank_main, args=(Path(directory), rank, args.ranks, args.width, args.rows))
            for rank in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    raise SystemExit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
