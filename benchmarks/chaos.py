"""Requests under random kills, pauses and restarts of nodes, with a stranger and a misfit among them.

    python benchmarks/chaos.py --requests 10000

Two prefill and two decode nodes and a router with one secret, twelve clients, a model of two layers whose every token
depends on all KV. Prints what became of the requests; status 1 when anything was lost, wrong, hung, leaked or sent to a
stranger. The quick form runs with the tests.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.e2e import tiny_model
from tests.e2e.chaos import Chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        chaos = Chaos(Path(directory), tiny_model.write(Path(directory) / "model"), args.seed)
        try:
            report = chaos.run(args.requests)
        finally:
            chaos.close()
    print(report)
    for name, value in report.failures().items():
        print(f"{name}: {value}")
    return bool(report.failures())


if __name__ == "__main__":
    raise SystemExit(main())
