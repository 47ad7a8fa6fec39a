"""Two OpenAI endpoints under the same load, in turn, in one sitting: figures of both and their ratio.

    python benchmarks/compare.py pd-serve=http://127.0.0.1:8000 vllm=http://127.0.0.1:8310

Every cell of the grid is measured ``--repeats`` times for each endpoint, one after the other (A B A B …), so that
a machine whose speed drifts slows both down alike; the median of the repeats is printed. Both servers stay up
throughout: check first that the one that is not asked costs no CPU (``--idle-check`` prints what is used
while nobody asks). A ratio above 1 means that the first endpoint is better, whatever the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    name: str
    path: tuple[str, ...]  # in the JSON of `pd-serve bench serve`
    more_is_better: bool = False

    def of(self, result: dict[str, Any]) -> float:
        value: Any = result
        for key in self.path:
            value = value[key]
        return float(value)


FIGURES = (
    Figure("TTFT median ms", ("ttft_ms", "median")),
    Figure("TTFT mean ms", ("ttft_ms", "mean")),
    Figure("ITL median ms", ("itl_ms", "median")),
    Figure("ITL mean ms", ("itl_ms", "mean")),
    Figure("output tok/s", ("output_tokens_per_s",), more_is_better=True),
)


def measure(url: str, input_len: int, output_len: int, concurrency: int, requests: int) -> dict[str, Any]:
    """One run of the load generator. Exits when a request fails: a figure over failures means nothing."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        flags = {
            "base-url": url, "input-len": input_len, "output-len": output_len, "concurrency": concurrency,
            "requests": requests, "warmup": min(4, 2 * concurrency), "json": out,
            "seed": time.time_ns() % 2**31,
        }  # fmt: skip
        command = [sys.executable, "-m", "pd_serve.cli", "bench", "serve"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"the load generator failed on {url}:\n{done.stderr[-2000:]}{done.stdout[-2000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
    if result["failed"] or result["short_outputs"]:
        sys.exit(
            f"{result['failed']} requests failed, {result['short_outputs']} were short on {url}: {result['errors']}"
        )
    return result


def busy_share() -> float:
    """Share of all cores that was in use over five seconds."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(values), values[3] + values[4]

    total, idle = ticks()
    time.sleep(5)
    total_after, idle_after = ticks()
    return 1 - (idle_after - idle) / (total_after - total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoints", nargs=2, metavar="NAME=URL")
    parser.add_argument("--inputs", type=int, nargs="+", default=[256, 512, 1024], help="prompt lengths in tokens")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 24], help="a run, for each concurrency")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all runs here")
    parser.add_argument("--idle-check", action="store_true")
    args = parser.parse_args()
    endpoints = [endpoint.split("=", 1) for endpoint in args.endpoints]
    if args.idle_check:
        print(f"CPU in use while nobody asks: {100 * busy_share():.1f}% of {os.cpu_count()} cores", flush=True)

    (first, first_url), (second, second_url) = endpoints
    runs = []
    print(
        f"{'c':>2} {'input':>5}  {'figure':<16} {first:>10} {second:>10} {'ratio':>6}  ratios of the repeats",
        flush=True,
    )
    for concurrency, requests in zip(args.concurrency, args.requests, strict=True):
        for input_len in args.inputs:
            pairs = []
            for _ in range(args.repeats):
                pair = [
                    measure(url, input_len, args.output_len, concurrency, requests) for url in (first_url, second_url)
                ]
                pairs.append(pair)
            runs.append({"concurrency": concurrency, "input_len": input_len, "pairs": pairs})
            for figure in FIGURES:
                values = [[figure.of(result) for result in pair] for pair in pairs]
                ratios = [a / b if figure.more_is_better else b / a for a, b in values]
                a, b = (statistics.median(column) for column in zip(*values, strict=True))
                print(
                    f"{concurrency:>2} {input_len:>5}  {figure.name:<16} {a:>10.1f} {b:>10.1f} "
                    f"{statistics.median(ratios):>6.2f}  {' '.join(f'{r:.2f}' for r in ratios)}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"endpoints": [first, second], "runs": runs}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
