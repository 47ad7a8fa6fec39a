"""Conversations that come back to a node whose KV cache is too small for them: without a host tier, eager, lazy.

    python -m benchmarks.host_kv --minutes 4 --repeats 3
    python -m benchmarks.host_kv --device cuda --clients 8
    python -m benchmarks.host_kv --device cuda --clients 8 --times 4 --url http://... --seed 1   # another server

What is asked are the conversations of Mooncake's trace (tests/router/traces) that have at least ``--turns`` turns in
its first ``--minutes``, in their order, ``--clients`` at a time and not at their times; a turn is asked when the one
before it has been answered. The trace names parts of prompts, 512 tokens each; here such a part has ``--part`` tokens
(on a CPU 16, on a GPU 128), and outputs are shortened alike. The *working set* is all parts that differ; the pool has
room for that many, half, and a quarter of them (``--times``), the host tier for all. One node of both roles computes
and decodes, with random weights: on a CPU in float32 with ``--layers`` layers of SmolLM2-135M's shape, on a GPU in
bfloat16 with Llama-3.1-8B's. Every run has a node of its own, and nothing is in its cache.

Said first is what there is to find: by the books alone, one prompt after the other, what a cache of that size has
of all prompts' tokens, and what the tier has behind it. Last, each mode against ``off`` of the same repeat. Another
server, at ``--url``, has to say how many tokens of a prompt were cached (vLLM: ``--enable-prompt-tokens-details``).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import statistics
import tempfile
import threading
import time
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu_serving import served
from benchmarks.shapes import write_model
from tests.e2e.tiny_model import Size, write
from tests.router.replay import TRACE

HTTP = httpx.Client(timeout=120, trust_env=False)  # one for all: making one costs more than a hundred requests
TRACED_PART = 512
CPU_PART, GPU_PART = 16, 128
SPARE = 4  # parts that the pool has room for beside the longest prompt, at least
HEADS = "times, tier, device, host, TTFT mean / p50 / p90 (ms), tokens/s, s, steps, busy s, loads, stores, ms a step"
# of vLLM, tokens. What it counts of its device's cache says nothing: a request that waits is counted at every step.
HOST_HITS = re.compile(r"^vllm:external_prefix_cache_hits_total\S* (\S+)$", re.M)


@dataclass(frozen=True)
class Ask:
    ids: list[int]
    output: int
    after: int  # the turn before it, by its place in the list; -1: none

    def prompt(self, part: int, seed: int) -> list[int]:
        """The same tokens for the same id."""
        return [t for id in self.ids for t in random.Random(f"{seed} {id}").choices(range(32, 220), k=part)]


@dataclass
class Answer:
    first_s: float = 0.0  # to the first token
    text: str = ""
    cached: int = 0  # tokens, in both tiers together


@dataclass(frozen=True)
class Found:
    times: float
    mode: str
    device: float  # share of all prompts' tokens
    host: float
    ttft_ms: list[float]  # sorted
    tokens: int
    took_s: float
    counters: dict[str, float]

    @property
    def rate(self) -> float:
        return self.tokens / self.took_s

    def cells(self) -> list[str]:
        ms, told = self.ttft_ms, self.counters
        cells = [
            f"{self.times:g}", self.mode, f"{self.device:.0%}", f"{self.host:.0%}",
            f"{statistics.mean(ms):.0f} / {ms[len(ms) // 2]:.0f} / {ms[int(len(ms) * 0.9)]:.0f}",
            f"{self.rate:.0f}", f"{self.took_s:.1f}", f"{told.get('steps', 0):.0f}",
            f"{told.get('step_seconds', 0):.1f}",
        ]  # fmt: skip
        for way in ("load", "store"):
            size, seconds = (told.get(f"host_kv_{way}_{what}", 0.0) for what in ("bytes", "seconds"))
            cells.append(f"{size / 1e6:.0f} MB, {size / seconds / 1e9:.1f} GB/s" if seconds else "")
        thread_s = told.get("host_kv_thread_seconds", 0.0)
        return [*cells, f"{thread_s / told['steps'] * 1e3:.3f}" if thread_s else ""]


def conversations(minutes: float, turns: int, part: int) -> list[Ask]:
    """Of at least so many turns in the trace's first minutes; all their turns there, in order of time."""
    with gzip.open(TRACE, "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row[0] < minutes * 60_000]
    found: defaultdict[tuple[int, ...], list[Any]] = defaultdict(list)
    for row in rows:
        found[tuple(row[3][:2])].append(row)
    asks: list[Ask] = []
    last: dict[tuple[int, ...], int] = {}
    for row in rows:
        key = tuple(row[3][:2])
        if len(found[key]) >= turns:
            asks.append(Ask(row[3], max(1, row[2] * part // TRACED_PART), last.get(key, -1)))
            last[key] = len(asks) - 1
    return asks


def there(asks: list[Ask], pool: float) -> tuple[float, float]:
    """The shares of all parts that a cache of so many parts has, least recently used, and a tier of all behind it."""
    cached: OrderedDict[int, None] = OrderedDict()
    seen: set[int] = set()
    device = both = 0
    for one in asks:
        device += next((i for i, id in enumerate(one.ids) if id not in cached), len(one.ids))
        both += next((i for i, id in enumerate(one.ids) if id not in seen), len(one.ids))
        for id in reversed(one.ids):  # a prompt's end goes first
            cached.pop(id, None)
            cached[id] = None
        seen.update(one.ids)
        while len(cached) > pool:
            cached.popitem(last=False)
    total = sum(len(one.ids) for one in asks)
    return device / total, (both - device) / total


def ask(url: str, model: str, one: Ask, prompt: list[int]) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": one.output, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began_s, found = time.perf_counter(), Answer()
    with HTTP.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found.first_s = found.first_s or time.perf_counter() - began_s
                said = json.loads(line[6:])
                found.text += "".join(choice["text"] for choice in said["choices"])
                if usage := said.get("usage"):
                    found.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return found


def drive(args: argparse.Namespace, url: str, asks: list[Ask]) -> tuple[list[Answer], float]:
    """The answers, and how long all took."""
    model = HTTP.get(f"{url}/v1/models").json()["data"][0]["id"]
    prompts = [one.prompt(args.part, args.seed) for one in asks]
    answered = [threading.Event() for _ in asks]

    def turn(at: int) -> Answer:
        try:
            if asks[at].after >= 0:
                answered[asks[at].after].wait()
            return ask(url, model, asks[at], prompts[at])
        finally:
            answered[at].set()

    warm = random.Random(args.seed).choices(range(220, 250), k=4 * args.part)
    with ThreadPoolExecutor(args.clients) as clients:
        # first the kernels of one chunk alone, of one beside decodes, and of decodes
        list(clients.map(lambda i: ask(url, model, Ask([], 8, -1), warm[i:]), range(args.clients)))
        began_s = time.perf_counter()
        answers = list(clients.map(turn, range(len(asks))))
        return answers, time.perf_counter() - began_s


def flags_of(args: argparse.Namespace, asks: list[Ask], mode: str, times: float) -> list[str]:
    parts, longest = len({id for one in asks for id in one.ids}), max(len(one.ids) for one in asks)
    flags: dict[str, object] = {"kv-cache-memory": max(int(parts / times), longest + SPARE) * args.part_bytes}
    flags |= args.flags
    flags["max-model-len"] = max(len(one.ids) * args.part + one.output + 1 for one in asks)
    if mode != "off":
        flags |= {"host-kv-memory": int(parts * 1.1) * args.part_bytes, "host-kv-mode": mode}
        if args.path:
            flags["host-kv-path"] = args.path
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run(args: argparse.Namespace, model: Path, asks: list[Ask], mode: str, times: float) -> Found:
    with served("one", 0, flags_of(args, asks, mode, times), model) as url:
        answers, took_s = drive(args, url, asks)
        time.sleep(2.5)  # an idle node's report
        [node] = HTTP.get(f"{url}/v1/status").json()["nodes"]
        counters = HTTP.get(f"{node['url']}/v1/status").json()["counters"]
    texts = [answer.text for answer in answers]
    args.texts = args.texts or texts
    # in bfloat16 a tie of two tokens falls by what else is in the batch
    assert texts == args.texts or args.device == "cuda", "another text than without a tier"
    hits = {"device": counters["prefix_hit_tokens"], "host": counters.get("host_kv_hit_tokens", 0.0)}
    return found(args, asks, mode, times, answers, took_s, hits, counters)


def elsewhere(args: argparse.Namespace, asks: list[Ask]) -> Found:
    """Of a server that runs, which may have what another seed's prompts led to."""

    def host() -> float:
        return sum(float(value) for value in HOST_HITS.findall(HTTP.get(f"{args.url}/metrics").text))

    before = host()
    answers, took_s = drive(args, args.url, asks)
    new = host() - before
    hits = {"device": sum(answer.cached for answer in answers) - new, "host": new}
    return found(args, asks, args.name, args.times[0], answers, took_s, hits, {})


def found(
    args: argparse.Namespace,
    asks: list[Ask],
    mode: str,
    times: float,
    answers: list[Answer],
    took_s: float,
    hits: dict[str, float],
    counters: dict[str, float],
) -> Found:
    prompts = sum(len(one.ids) * args.part for one in asks)
    tokens = prompts + sum(one.output for one in asks)
    ttft_ms = sorted(answer.first_s * 1e3 for answer in answers)
    return Found(times, mode, hits["device"] / prompts, hits["host"] / prompts, ttft_ms, tokens, took_s, counters)


def compare(runs: list[Found]) -> None:
    """Each mode against off of the same repeat, which comes before it."""
    ratios: defaultdict[tuple[float, str], list[tuple[float, float, float]]] = defaultdict(list)
    off: dict[float, Found] = {}
    for one in runs:
        if one.mode == "off":
            off[one.times] = one
        elif base := off.get(one.times):
            means = [statistics.mean(each.ttft_ms) for each in (one, base)]
            middles = [statistics.median(each.ttft_ms) for each in (one, base)]
            ratios[one.times, one.mode].append((one.rate / base.rate, means[0] / means[1], middles[0] / middles[1]))
    for (times, mode), each in sorted(ratios.items()):
        words = [
            f"{what} {statistics.median(column):.2f} times ({min(column):.2f} to {max(column):.2f})"
            for what, column in zip(("tokens/s", "mean TTFT", "median TTFT"), zip(*each, strict=True), strict=True)
        ]
        print(f"RESULT {mode} against off, {times:g} times the pool: {', '.join(words)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 2, 4], help="working set over the pool")
    parser.add_argument("--modes", nargs="+", default=["off", "eager", "lazy"])
    parser.add_argument("--minutes", type=float, default=5, help="of the trace")
    parser.add_argument("--turns", type=int, default=3, help="of a conversation in these minutes, at least")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", type=int, default=0, help=f"tokens, by default {CPU_PART}, on a GPU {GPU_PART}")
    parser.add_argument("--layers", type=int, default=0, help="by default 8, on a GPU 32")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--path", default="", help="a directory: the tier is a file there")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' tokens")
    parser.add_argument("--url", default="", help="ask this server instead")
    parser.add_argument("--name", default="other", help="what it is called in the table")
    args = parser.parse_args()
    args.texts = []
    size = Size(576, args.layers or 8, 9, 3, 64, 1536, 8192)
    if args.device == "cpu":
        args.write = lambda folder: write(folder, size)
        args.part = args.part or CPU_PART
        args.part_bytes = size.block_bytes * args.part // CPU_PART
        args.flags = {
            "threads": args.threads,
            "max-num-batched-tokens": 256,
            "device": "cpu",
            "dtype": "float32",
            "load-format": "auto",
        }
    else:
        args.part, layers = args.part or GPU_PART, args.layers or 32
        args.write = lambda folder: write_model(folder, layers) / "config.json"
        args.part_bytes = args.part * layers * 2 * 8 * 128 * 2  # K and V of 8 heads in bfloat16
        args.flags = {"device": "cuda", "dtype": "bfloat16", "load-format": "dummy"}
    return args


def main() -> None:
    args = arguments()
    asks = conversations(args.minutes, args.turns, args.part)
    parts = {id for one in asks for id in one.ids}
    print(
        f"{len(asks)} prompts of {sum(one.after < 0 for one in asks)} conversations, "
        f"{sum(len(one.ids) for one in asks) * args.part} tokens, {sum(one.output for one in asks)} to be made; "
        f"working set {len(parts)} parts of {args.part_bytes >> 10} KiB"
    )
    for times in args.times:
        device, host = there(asks, len(parts) / times)
        print(f"a pool of 1/{times:g}: {device:.0%} of the tokens are on the device, {host:.0%} in the tier")
    print(f"\n| {' | '.join(HEADS.split(', '))} |\n|{' --- |' * len(HEADS.split(', '))}", flush=True)
    if args.url:
        print(f"| {' | '.join(elsewhere(args, asks).cells())} |", flush=True)
        return
    runs: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.write(Path(folder) / "model")
        for _ in range(args.repeats):
            for times in args.times:
                for mode in args.modes:
                    runs.append(run(args, model, asks, mode, times))
                    print(f"| {' | '.join(runs[-1].cells())} |", flush=True)
    compare(runs)


if __name__ == "__main__":
    main()
