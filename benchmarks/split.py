"""What splitting prefill from decode costs one request: a prefill/decode pair against one node that does both.

    pd-serve up --port 8000 &                            # the pair
    pd-serve up --port 8001 --prefill 0 --threads 1 &    # one node alone, one thread as each of the pair has
    python benchmarks/split.py http://127.0.0.1:8000 http://127.0.0.1:8001

One request at a time, the two endpoints in turn. Prints the time to the first token, the gap between the first and
the second token (in a pair it holds the end of the transfer and the hand-over), and the gaps after it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from itertools import pairwise

import httpx

OUTPUT_TOKENS = 24


def token_times(client: httpx.Client, url: str, model: str, prompt: list[int]) -> tuple[float, list[float]]:
    """When the request was sent, and when each token was read; seconds."""
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    sent = time.perf_counter()
    times = []
    with client.stream(
        "POST", url + "/v1/completions", json=body | {"stream": True, "return_token_ids": True}
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                for choice in json.loads(line[6:])["choices"]:
                    times += [now] * len(choice.get("token_ids") or [])
    if len(times) != OUTPUT_TOKENS:
        sys.exit(f"{url} sent {len(times)} tokens instead of {OUTPUT_TOKENS}")
    return sent, times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair")
    parser.add_argument("alone")
    parser.add_argument("--inputs", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--requests", type=int, default=12, help="for each endpoint and length")
    args = parser.parse_args()
    ids = random.Random(0)
    print(f"{'input':>5}  {'':<6} {'TTFT':>8} {'1st-2nd':>8} {'ITL after':>9}   medians of {args.requests}, ms")
    with httpx.Client(timeout=120) as client:
        model = client.get(args.pair + "/v1/models").json()["data"][0]["id"]
        for length in args.inputs:
            figures: dict[str, list[tuple[float, float, float]]] = {"pair": [], "alone": []}
            for turn in range(args.requests + 1):
                for name, url in (("pair", args.pair), ("alone", args.alone)):
                    prompt = [ids.randrange(1000, 40000) for _ in range(length)]
                    sent, times = token_times(client, url, model, prompt)
                    gaps = [(b - a) * 1e3 for a, b in pairwise(times)]
                    if turn:  # the first of each warms up
                        figures[name].append(((times[0] - sent) * 1e3, gaps[0], statistics.median(gaps[1:])))
            for name, rows in figures.items():
                ttft, second, itl = (statistics.median(column) for column in zip(*rows, strict=True))
                print(f"{length:>5}  {name:<6} {ttft:>8.1f} {second:>8.1f} {itl:>9.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
