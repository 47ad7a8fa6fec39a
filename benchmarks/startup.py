"""From the command to the first served token: `pd-serve up` with everything installed, several times.

python benchmarks/startup.py [--repeats 5] [-- --dtype bfloat16 ...]
"""

from __future__ import annotations

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import time

import httpx

TIMEOUT_S = 120


def start_once(flags: list[str]) -> tuple[float, float]:
    """Seconds until the router is ready, and until a one-token completion was answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "pd_serve.cli", "up", "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                sys.exit("pd-serve up did not become ready; run it by hand to see why")
            try:
                if httpx.get(url + "/ready", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.02)
        ready = time.perf_counter() - started
        model = httpx.get(url + "/v1/models", timeout=10).json()["data"][0]["id"]
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        httpx.post(url + "/v1/completions", json=body, timeout=60).raise_for_status()
        return ready, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="for `pd-serve up`, after --")
    args = parser.parse_args()
    runs = [start_once(args.flags) for _ in range(args.repeats)]
    for name, column in zip(("ready", "first completion"), zip(*runs, strict=True), strict=True):
        print(f"{name:<17} median {statistics.median(column):.2f} s   min {min(column):.2f}   max {max(column):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
