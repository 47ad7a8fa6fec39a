"""What a process and its children use of a core while nobody asks, and how often their threads wake up.

    pd-serve up & python benchmarks/idle.py $! --seconds 30

From ``/proc/PID/task/TID/schedstat`` (nanoseconds on a core, and how often it got one): the ticks of
``/proc/PID/stat`` are too coarse for what is idle. Linux only.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import psutil


def measured(root: psutil.Process) -> dict[tuple[int, str], tuple[int, int]]:
    """Nanoseconds on a core, and turns, of each thread."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            on_core_ns, _, turns = map(int, (task / "schedstat").read_text().split())
            found[process.pid, task.name] = on_core_ns, turns
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pid", type=int, help="the process; its children count too")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    root = psutil.Process(arguments.pid)
    before = measured(root)
    time.sleep(arguments.seconds)
    after = measured(root)
    used_ns, turns = Counter[int](), Counter[int]()
    for thread in before.keys() & after.keys():
        used_ns[thread[0]] += after[thread][0] - before[thread][0]
        turns[thread[0]] += after[thread][1] - before[thread][1]
    for pid in sorted(used_ns):
        command = " ".join(psutil.Process(pid).cmdline())[-60:]
        percent = used_ns[pid] / arguments.seconds / 1e7
        print(f"{pid:7} {percent:.3f}% of a core  {turns[pid] / arguments.seconds:5.1f} wake-ups/s  {command}")


if __name__ == "__main__":
    main()
