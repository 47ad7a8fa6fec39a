"""Conversations that come back to a node whose KV cache is too small for them: without a host tier, eager, lazy.

    python -m benchmarks.host_kv --times 1 2 4
    python -m benchmarks.host_kv --device cuda --working-set 240 --clients 8

What is asked are the first conversations of Mooncake's trace that have several turns (tests/router/traces), in their
order, ``--clients`` at a time, not at their times. The trace names parts of prompts, 512 tokens each; here such a part
has ``--part`` tokens (on a CPU 16, a KV block), and outputs are shortened alike. The *working set* is all parts that
differ; the pool has room for that many, half, and a quarter of them (``--times``), the host tier for all. One node of
both roles computes and decodes, with random weights: on a CPU in float32 with ``--layers`` layers of SmolLM2-135M's
shape, on a GPU in bfloat16 with Llama-3.1-8B's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import write_model
from tests.e2e.cluster import HTTP, Cluster, cluster
from tests.e2e.tiny_model import Size, write
from tests.router.replay import TRACE

TRACED_PART = 512
CPU_PART, GPU_PART = 16, 512
MARGIN = 48  # parts: of the longest prompt and what it leads to, which a pool needs besides


@dataclass(frozen=True)
class Ask:
    ids: list[int]
    output: int

    def prompt(self, part: int) -> list[int]:
        """The same tokens for the same id."""
        return [token for id in self.ids for token in random.Random(id).choices(range(32, 220), k=part)]


def conversations(working_set: int, part: int) -> list[Ask]:
    """Of several turns, the first ones, until they have that many parts; all their turns in order of time."""
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    turns: defaultdict[tuple[int, ...], list[Any]] = defaultdict(list)
    for row in rows:
        turns[tuple(row[3][:2])].append(row)
    chosen: list[Any] = []
    parts: set[int] = set()
    for found in turns.values():
        if len(found) > 1 and len(parts) < working_set:
            chosen += found
            parts.update(*(row[3] for row in found))
    chosen.sort(key=lambda row: row[0])
    return [Ask(row[3], max(1, row[2] * part // TRACED_PART)) for row in chosen]


def ask(system: Cluster, model: str, one: Ask, prompt: list[int]) -> tuple[float, str]:
    """Seconds to the first token, and the text."""
    body = {"model": model, "prompt": prompt, "max_tokens": one.output, "temperature": 0, "ignore_eos": True}
    began_s, first_s, text = time.perf_counter(), 0.0, ""
    with HTTP.stream("POST", f"{system.url}/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.perf_counter() - began_s
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return first_s, text


def run(args: argparse.Namespace, model: Path, asks: list[Ask], mode: str, times: float) -> list[str]:
    parts = len({id for one in asks for id in one.ids})
    flags: dict[str, object] = {"kv_cache_memory": (int(parts / times) + MARGIN) * args.part_bytes, **args.flags}
    flags["max_model_len"] = max(1024, *(len(one.ids) * args.part + one.output + 1 for one in asks))
    if mode != "off":
        flags |= {"host_kv_memory": int(parts * 1.1) * args.part_bytes, "host_kv_mode": mode}
        if args.path:
            flags["host_kv_path"] = args.path
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Path(folder), model=model, prefill=0, decode=0, both=1, **flags) as system,
        ThreadPoolExecutor(args.clients) as clients,
    ):
        name = system.model
        prompts = [one.prompt(args.part) for one in asks]
        system.complete("warm", 2)
        began_s = time.perf_counter()
        answers = list(clients.map(lambda one, prompt: ask(system, name, one, prompt), asks, prompts))
        took_s = time.perf_counter() - began_s
        time.sleep(2.5)  # an idle node's report
        [node] = system.boths
        counters = node.get("/v1/status")["counters"]
    return line(args, asks, answers, mode, times, took_s, counters)


def line(
    args: argparse.Namespace,
    asks: list[Ask],
    answers: list[tuple[float, str]],
    mode: str,
    times: float,
    took_s: float,
    counters: dict[str, float],
) -> list[str]:
    texts = [text for _, text in answers]
    args.texts = args.texts or texts
    # in bfloat16 a tie of two tokens falls by what else is in the batch
    assert texts == args.texts or args.device == "cuda", "another text than without a tier"
    prompts, outputs = sum(len(one.ids) * args.part for one in asks), sum(one.output for one in asks)
    ttft_ms = sorted(first * 1e3 for first, _ in answers)
    host = counters.get("host_kv_hit_tokens", 0.0)
    cells = [
        f"{times:g}", mode, f"{counters['prefix_hit_tokens'] / prompts:.0%}", f"{host / prompts:.0%}",
        f"{statistics.mean(ttft_ms):.0f} / {ttft_ms[len(ttft_ms) // 2]:.0f} / {ttft_ms[int(len(ttft_ms) * 0.9)]:.0f}",
        f"{(prompts + outputs) / took_s:.0f}", f"{took_s:.1f}",
    ]  # fmt: skip
    for way in ("load", "store"):
        size, seconds = (counters.get(f"host_kv_{way}_{what}", 0.0) for what in ("bytes", "seconds"))
        cells.append(f"{size / 1e6:.0f} MB, {size / seconds / 1e9:.1f} GB/s" if seconds else "")
    thread_ms = counters.get("host_kv_thread_seconds", 0.0) / max(1.0, counters["steps"]) * 1e3
    return [*cells, f"{thread_ms:.3f}" if mode != "off" else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 2, 4], help="working set over the pool")
    parser.add_argument("--modes", nargs="+", default=["off", "eager", "lazy"])
    parser.add_argument("--working-set", type=int, default=800, help="blocks, at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", type=int, default=0, help=f"tokens, by default {CPU_PART}, on a GPU {GPU_PART}")
    parser.add_argument("--layers", type=int, default=0, help="by default 8, on a GPU 32")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU engine")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--path", default="", help="a directory: the tier is a file there")
    args = parser.parse_args()
    args.texts = []
    size = Size(576, args.layers or 8, 9, 3, 64, 1536, 8192)
    if args.device == "cpu":
        args.part = args.part or CPU_PART
        args.part_bytes = size.block_bytes * args.part // CPU_PART
        args.flags = {"threads": args.threads, "max_num_batched_tokens": 256}
    else:
        args.part, layers = args.part or GPU_PART, args.layers or 32
        args.part_bytes = args.part * layers * 2 * 8 * 128 * 2  # K and V of 8 heads in bfloat16
        args.flags = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy"}
    asks = conversations(args.working_set, args.part)
    parts = {id for one in asks for id in one.ids}
    print(
        f"{len(asks)} prompts, {sum(len(one.ids) for one in asks) * args.part} tokens, working set {len(parts)} parts "
        f"of {args.part_bytes >> 10} KiB\n"
    )
    heads = [
        "times",
        "tier",
        "device",
        "host",
        "TTFT mean / p50 / p90, ms",
        "tokens/s",
        "s",
        "loads",
        "stores",
        "ms a step",
    ]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cpu":
            model = write(Path(folder) / "model", size)
        else:
            model = write_model(Path(folder) / "model", layers) / "config.json"
        for times in args.times:
            for mode in args.modes:
                print(f"| {' | '.join(run(args, model, asks, mode, times))} |", flush=True)


if __name__ == "__main__":
    main()
