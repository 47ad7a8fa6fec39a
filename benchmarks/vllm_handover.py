"""What a hand-over between two vLLM servers takes, with NixlConnector and with pd-serve's connector, on two GPUs.

    python -m benchmarks.vllm_handover [--model DIR] [--connector ours nixl ...] [--at-once N] [--trace] [--json FILE]

Needs vLLM, nixl and pd-serve in one environment. Without ``--model`` the shape of Llama-3.1-8B with dummy weights. Two
servers a connector: prefill on GPU 0, decode on GPU 1. For each prompt length, one request at a time: until the prefill
server's answer; from then to the decode server's first own token; until a client has its first token (with ours the
prefill server's, which goes out at once). Then 64 requests of 2,048 tokens at once: the median and the 99th percentile
of the hand-over. What pd-serve's lanes say in the servers' logs is printed.

Connectors: ``nixl``; ``ours``; ``whole``, which is ours with all layers of a block side by side (as vLLM up to 0.28
does it: the first model runner, HND). With ``/tcp`` behind it both servers have UCX_TLS=tcp,cuda_copy, so that NIXL
falls to TCP. ``--at-once``: so many pairs are started side by side, and measured one after the other, the rest idle:
each then needs its part of the GPUs' memory (``--kv-cache-gb``).

``same_tokens``: of 16 tokens each of 8 prompts, how many in a row are those of the prefill server alone, on average
(bfloat16 and dummy weights: near-ties flip); ``different_tokens``: how many different ones there were.
``nothing_handed_over_ms``: until the decode server's first token of a prompt of 16 tokens of its own: what of every
hand-over is vLLM's. ``--trace``: where the time of those 64 goes (:mod:`benchmarks.vllm_trace`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.shapes import write_model

LENGTHS = (512, 2048, 8192)
REPEATS, BURST, BURST_TOKENS, DECODED = 8, 64, 2048, 32
COMPARED, COMPARED_TOKENS, COMPARED_OUT = 8, 1000, 16
START_S, END_S = 240, 20
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
OURS = {
    "kv_connector": "PdServeConnector",
    "kv_connector_module_path": "pd_serve.integrations.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "fail",  # a hand-over that fails is no fast one
}
TRACED = {**OURS, "kv_connector": "TracedConnector", "kv_connector_module_path": "benchmarks.vllm_trace"}
TRACED["kv_connector_extra_config"] = {"log_level": "debug"}
MOVED = re.compile(r"(burst\d+)-.*: announced ([\d.]+) ms after .* here after ([\d.]+) ms; bytes moved for ([\d.]+) ms")
TRACE = "VLLM_HANDOVER_TRACE"  # names a traced server's file
MOMENTS = ("computed", "answered", "arrived", "asked", "begun", "told", "runs", "first")
WHOLE_BLOCKS = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_KV_CACHE_LAYOUT": "HND"}
TCP = {"UCX_TLS": "tcp,cuda_copy"}
TOLD = ("pd-serve's", " reads ", "left out", "GB/s", "not fetched", "Traceback")
KEEP = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
KEEP |= {"remote_host": None, "remote_port": None}


class Server:
    """``name``: as after ``--connector``."""

    def __init__(self, name: str, model: Path, gpu: int, arguments: argparse.Namespace):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            port, side = one.getsockname()[1], other.getsockname()[1]
        stem = str(arguments.logs / f"{name.replace('/', '-')}{gpu}")
        self.url, self.log, self.trace = f"http://127.0.0.1:{port}", Path(f"{stem}.log"), Path(f"{stem}.trace")
        self.trace.unlink(missing_ok=True)
        kind, _, fallen = name.partition("/")
        connector = NIXL if kind == "nixl" else TRACED if arguments.trace else OURS
        environ = {
            **os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side),
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1", TRACE: str(self.trace),
            **(WHOLE_BLOCKS if kind == "whole" else {}), **(TCP if fallen else {}),
        }  # fmt: skip
        if arguments.kv_cache_gb:
            memory = [
                "--kv-cache-memory-bytes",
                str(int(arguments.kv_cache_gb * 1e9)),
                "--gpu-memory-utilization",
                "0.1",
            ]
        else:
            memory = ["--gpu-memory-utilization", str(arguments.gpu_memory_utilization)]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "16384",
            "--max-num-batched-tokens", "16384", *memory,
            "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port),
            "--kv-transfer-config", json.dumps(connector), *([] if arguments.model else ["--load-format", "dummy"]),
            *arguments.server_argument,
        ]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environ, start_new_session=True)

    async def ready(self, client: httpx.AsyncClient) -> None:
        until_s = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < until_s:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{self.url}/health")).status_code == 200:
                    return
            await asyncio.sleep(1)
        raise RuntimeError(f"a server does not start:\n{self.log.read_text(errors='replace')[-6000:]}")

    def stop(self) -> None:
        """Returns when its engine's process has ended too: the next server needs the GPU's memory."""
        until_s = time.monotonic() + END_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            while time.monotonic() < until_s:
                self.process.poll()
                os.killpg(self.process.pid, 0)
                time.sleep(0.2)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


BODY = {"model": "m", "temperature": 0, "ignore_eos": True}


def prompt_of(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 120000) for _ in range(count)]


def named(name: str) -> dict[str, str]:
    """What makes a request's name known to both servers."""
    return {"X-Request-Id": name} if name else {}


async def prefill(
    client: httpx.AsyncClient, p: Server, prompt: list[int], name: str = ""
) -> tuple[dict[str, Any], list[int]]:
    """What a decode server is asked after the prefill server's answer, and that one's token."""
    body = {**BODY, "prompt": prompt, "max_tokens": 1, "return_token_ids": True, "kv_transfer_params": KEEP}
    answer = await client.post(f"{p.url}/v1/completions", json=body, headers=named(name))
    answer.raise_for_status()
    said = answer.json()
    params, first = said["kv_transfer_params"], said["choices"][0]["token_ids"]
    if "pd_serve" in params:  # it goes on with the second token
        prompt = prompt + first
    return {"prompt": prompt, "kv_transfer_params": params}, first


async def handed_over(
    client: httpx.AsyncClient, p: Server, d: Server, prompt: list[int], name: str = ""
) -> tuple[float, float]:
    """Seconds until the prefill server's answer, and from then to the decode server's first own token."""
    begun = time.perf_counter()
    asked, _ = await prefill(client, p, prompt, name)
    answered = time.perf_counter()
    return answered - begun, await first_token_s(client, d, asked, name)


async def first_token_s(client: httpx.AsyncClient, server: Server, asked: dict[str, Any], name: str = "") -> float:
    """Seconds until the first token of a stream, which is read to its end."""
    begun, first = time.perf_counter(), 0.0
    body = {**BODY, "max_tokens": DECODED, "stream": True, **asked}
    async with client.stream("POST", f"{server.url}/v1/completions", json=body, headers=named(name)) as lines:
        lines.raise_for_status()
        async for line in lines.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begun
    return first


async def burst(client: httpx.AsyncClient, p: Server, d: Server) -> tuple[list[float], list[str]]:
    """Of many requests at once: the seconds of each hand-over, in ascending order, and where they went."""
    offset_s = time.time() - time.perf_counter()
    own: dict[str, dict[str, float]] = {}

    async def one(name: str, prompt: list[int]) -> float:
        begun = time.perf_counter()
        to_answer_s, hand_over_s = await handed_over(client, p, d, prompt, name)
        answered = offset_s + begun + to_answer_s
        own[name] = {"answered": answered, "first": answered + hand_over_s}
        return hand_over_s

    prompts = {f"burst{i}": prompt_of(BURST_TOKENS, 100 + i) for i in range(BURST)}
    times = await asyncio.gather(*(one(*item) for item in prompts.items()))
    return sorted(times), stages(own, p, d) if d.trace.exists() else []


def spread(values: Iterable[float]) -> str:
    """The median, the 90th percentile and the largest."""
    found = sorted(values)
    return ", ".join(f"{value:.1f}" for value in (found[len(found) // 2], found[int(0.9 * len(found))], found[-1]))


def stages(own: dict[str, dict[str, float]], p: Server, d: Server) -> list[str]:
    """Rows of milliseconds between one moment and the next: of the median, the 90th percentile and the longest, each
    by itself, and of the one request whose whole took longest. ``own``: by request, what its client saw."""
    steps: list[tuple[float, int]] = []
    for server in (p, d):
        for what, at_s, said in map(json.loads, server.trace.read_text().splitlines()):
            if what == "step" and server is d:
                steps.append((at_s, said[1]))
            name = next((name for name in own if isinstance(said, str) and f"{name}-" in said), None)
            if name is not None:
                own[name].setdefault(what, at_s)
    whole = {name: seen for name, seen in own.items() if all(what in seen for what in MOMENTS)}
    rows = [f"{len(whole)} of {len(own)} requests, ms: median, 90th percentile, longest; of the slowest request"]
    if not whole:
        return rows
    slowest = max(whole.values(), key=lambda seen: seen["first"] - seen["answered"])
    for begin, end in [*itertools.pairwise(MOMENTS), ("answered", "first")]:
        spans = spread((seen[end] - seen[begin]) * 1e3 for seen in whole.values())
        rows.append(f"{begin} to {end}: {spans}; {(slowest[end] - slowest[begin]) * 1e3:.1f}")
    moved = [match for line in d.log.read_text(errors="replace").splitlines() if (match := MOVED.search(line))]
    for row, what in enumerate(("begun to announced", "begun to here", "bytes moved for"), 2):
        if moved:
            rows.append(f"{what}: {spread(float(match[row]) for match in moved)}")
    since_s = min(seen["answered"] for seen in whole.values())
    gaps = [(b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(steps) if a[0] >= since_s and a[1] and b[1]]
    if gaps:
        rows.append(f"between steps that decode: {spread(gaps)}")
    return rows


async def compared(client: httpx.AsyncClient, p: Server, d: Server) -> tuple[float, int]:
    """Tokens in a row that are those of the prefill server alone, on average, and how many different ones it made."""
    rows, seen = [], set()
    for seed in range(COMPARED):
        prompt = prompt_of(COMPARED_TOKENS, 1000 + seed)
        body = {**BODY, "prompt": prompt, "max_tokens": COMPARED_OUT, "return_token_ids": True}
        alone = (await client.post(f"{p.url}/v1/completions", json=body)).json()["choices"][0]["token_ids"]
        asked, first = await prefill(client, p, prompt)
        done = first if len(asked["prompt"]) > len(prompt) else []
        asked |= {**BODY, "max_tokens": COMPARED_OUT - len(done), "return_token_ids": True}
        answer = await client.post(f"{d.url}/v1/completions", json=asked)
        answer.raise_for_status()
        split = done + answer.json()["choices"][0]["token_ids"]
        rows.append(next((i for i, pair in enumerate(zip(alone, split, strict=True)) if len({*pair}) > 1), len(alone)))
        seen |= set(alone)
    return statistics.mean(rows), len(seen)


async def measure(name: str, p: Server, d: Server) -> dict[str, Any]:
    found: dict[str, Any] = {"connector": name}
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        await handed_over(client, p, d, prompt_of(512, 0))  # the first one shakes hands
        found["same_tokens"], found["different_tokens"] = await compared(client, p, d)
        short = [await first_token_s(client, d, {"prompt": prompt_of(16, seed)}) for seed in range(REPEATS)][1:]
        found["nothing_handed_over_ms"] = statistics.median(short) * 1e3
        for count in LENGTHS:
            times = [await handed_over(client, p, d, prompt_of(count, seed)) for seed in range(REPEATS)][1:]
            prefill_ms, hand_over_ms = (statistics.median(t[i] for t in times) * 1e3 for i in range(2))
            ttft_ms = prefill_ms + hand_over_ms if name.startswith("nixl") else prefill_ms
            found[str(count)] = {"prefill_ms": prefill_ms, "hand_over_ms": hand_over_ms, "ttft_ms": ttft_ms}
        times, rows = await burst(client, p, d)
        found["burst_hand_over_ms"] = {"p50": times[BURST // 2] * 1e3, "p99": times[int(0.99 * BURST)] * 1e3}
        found |= {"stages": rows} if rows else {}
    return found


async def ready(servers: dict[str, list[Server]]) -> dict[str, str]:
    """Until all serve, or do not; by connector, why not."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        waits = [(name, server.ready(client)) for name, pair in servers.items() for server in pair]
        ends = await asyncio.gather(*(wait for _, wait in waits), return_exceptions=True)
    return {name: str(end) for (name, _), end in zip(waits, ends, strict=True) if end is not None}


def side_by_side(names: list[str], model: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Starts a pair for each connector, and measures one after the other."""
    servers: dict[str, list[Server]] = {}
    try:
        for name in names:
            servers[name] = [Server(name, model, gpu, arguments) for gpu in range(2)]
        failures = asyncio.run(ready(servers))
        for name, pair in servers.items():
            try:
                if name in failures:
                    raise RuntimeError(failures[name])
                yield asyncio.run(measure(name, *pair))
            except (RuntimeError, httpx.HTTPError) as error:  # the others are measured all the same
                print(f"{name} failed: {error}")
                yield {"connector": name, "failed": repr(error)[:200]}
            for server in pair:
                for line in server.log.read_text(errors="replace").splitlines():
                    if any(word in line for word in TOLD):
                        print(f"{server.log.name}: {line[-400:]}", flush=True)
    finally:
        for server in (server for pair in servers.values() for server in pair):
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    known = [kind + fallen for kind in ("nixl", "ours", "whole") for fallen in ("", "/tcp")]
    parser.add_argument("--connector", nargs="+", choices=known, default=["nixl", "ours"])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--kv-cache-gb", type=float, help="a server's, in place of a share of the GPU")
    parser.add_argument(
        "--server-argument",
        action="append",
        default=[],
        help="one more, such as --server-argument=--no-async-scheduling",
    )
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.mkdtemp(prefix="vllm-handover-")))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # servers are stopped then, too
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or write_model(Path(scratch), 32)
        results = []
        for first in range(0, len(arguments.connector), arguments.at_once):
            for result in side_by_side(arguments.connector[first : first + arguments.at_once], model, arguments):
                results.append(result)
                print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
