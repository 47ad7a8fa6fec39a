"""A prefill and a decode node offered three times what they can serve: what becomes of the requests, and of memory.

    python benchmarks/overload.py --seconds 600

First a closed loop of ``--clients`` clients for ``--baseline`` seconds: its rate of answers is the *capacity*. Then
requests at random times (Poisson) at ``--times`` that rate for ``--seconds``; a client that gets a 429 waits for
``Retry-After`` and asks again, at most ``--retries`` times. Every process runs on this machine. Prompts are random and
all different. ``prompts computed an answer`` is what the prefill engine computed, over the length of a prompt and the
number of answers: 1 means that no work was thrown away.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from pd_serve.bench.client import Client, HttpError
from tests.e2e.cluster import Cluster, children

HANGS_S = 300.0


@dataclass
class Run:
    """``seconds``: in which requests were sent; what they led to may have taken longer."""

    seconds: float
    within: int = 0  # answers that ended in that time
    statuses: Counter[str] = field(default_factory=Counter)  # of each request's last answer
    refusals: int = 0  # answers 429, those that were asked again included
    without_retry_after: int = 0
    e2e_s: list[float] = field(default_factory=list)  # of answers, from the asking that was admitted
    ttft_s: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    computed_tokens: float = 0.0
    rss_mib: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end_s = time.perf_counter() + self.seconds

    def ended(self, how: str, why: str = "") -> None:
        self.statuses[how] += 1
        if why:
            self.broken.append(why)

    @property
    def answers(self) -> int:
        return len(self.e2e_s)

    @property
    def rate(self) -> float:
        return self.within / self.seconds


class Load:
    def __init__(self, system: Cluster, prompt_len: int, output_len: int, seed: int) -> None:
        self._system = system
        self._chance = random.Random(seed)
        self._prompt_len = prompt_len
        self._output_len = output_len
        self._model = system.model
        self._client = Client(system.url, "", HANGS_S)
        self._whole = f'"completion_tokens":{output_len}'.encode()

    def body(self) -> bytes:
        prompt = [self._chance.randrange(100, 30_000) for _ in range(self._prompt_len)]
        fields = {
            "model": self._model, "prompt": prompt, "max_tokens": self._output_len, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return json.dumps(fields).encode()

    async def one(self, run: Run, retries: int) -> None:
        body = self.body()
        for left in range(retries, -1, -1):
            started_s = time.perf_counter()
            first_s, whole = 0.0, False

            def on_event(now_s: float, data: bytes) -> None:
                nonlocal first_s, whole
                first_s = first_s or now_s
                whole = whole or self._whole in data

            try:
                answer = await self._client.post("/v1/completions", body, on_event)
            except HttpError as error:
                run.ended("broken", str(error))
                return
            if answer.status == 429:
                run.refusals += 1
                run.without_retry_after += not answer.retry_after
                if not left:
                    run.ended("429")
                    return
                await asyncio.sleep(float(answer.retry_after or 1) * self._chance.uniform(1.0, 1.5))
                continue
            if answer.status != 200 or not whole:
                run.ended(str(answer.status), answer.body.decode(errors="replace")[:200] or "the stream ended early")
                return
            run.ended("200")
            run.ttft_s.append(first_s - started_s)
            run.e2e_s.append(time.perf_counter() - started_s)
            run.within += time.perf_counter() < run.end_s
            return

    # --- two loads ------------------------------------------------------------------------------------

    async def closed(self, clients: int, seconds: float) -> Run:
        run = Run(seconds)

        async def client() -> None:
            while time.perf_counter() < run.end_s:
                await self.one(run, 0)

        await self._measured(run, asyncio.gather(*(client() for _ in range(clients))))
        return run

    async def open(self, rate: float, seconds: float, retries: int) -> Run:
        run = Run(seconds)

        async def arrivals() -> None:
            async with asyncio.TaskGroup() as group:
                due_s = time.perf_counter()
                while due_s < run.end_s:
                    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    group.create_task(self.one(run, retries))
                    due_s += self._chance.expovariate(rate)

        await self._measured(run, asyncio.ensure_future(arrivals()))
        return run

    async def _measured(self, run: Run, work: asyncio.Future[object]) -> None:
        computed = self._computed()
        while not work.done():
            run.rss_mib.append(rss_mib(self._system))
            await asyncio.wait({work}, timeout=5)
        await work
        run.computed_tokens = self._computed() - computed

    def _computed(self) -> float:
        return float(sum(n.get("/v1/status")["counters"].get("computed_tokens", 0) for n in self._system.prefills))


def rss_mib(system: Cluster) -> dict[str, int]:
    """Resident memory by process; a node's second process is its engine."""
    found = {}
    for name, server in (("router", system.router), ("prefill", system.prefills[0]), ("decode", system.decodes[0])):
        for kind, pid in (("", server.pid), *(("-engine", pid) for pid in children(server.pid))):
            pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
            found[name + kind] = int(pages) * 4096 >> 20
    return found


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else float("nan")


def show(name: str, run: Run, prompt_len: int) -> None:
    print(
        f"{name}: {run.seconds:.0f} s, {run.rate:.2f} answers/s, last answers {dict(run.statuses)}, 429 in all "
        f"{run.refusals} ({run.without_retry_after} without Retry-After)"
    )
    print(
        f"  e2e p50 {percentile(run.e2e_s, 50):.2f} p99 {percentile(run.e2e_s, 99):.2f} s, TTFT p50 "
        f"{percentile(run.ttft_s, 50):.2f} p99 {percentile(run.ttft_s, 99):.2f} s, prompts computed an answer "
        f"{run.computed_tokens / prompt_len / max(1, run.answers):.3f}"
    )
    middle, last = run.rss_mib[len(run.rss_mib) // 2], run.rss_mib[-1]
    print(f"  RSS MiB first {run.rss_mib[0]}\n      half {middle}\n      last {last}")
    for what in run.broken[:3]:
        print(f"  broken: {what}")


async def measure(args: argparse.Namespace, system: Cluster) -> int:
    load = Load(system, args.prompt_len, args.output_len, args.seed)
    await load.closed(args.clients, min(10.0, args.baseline))  # warm up
    base = await load.closed(args.clients, args.baseline)
    show("capacity", base, args.prompt_len)
    over = await load.open(args.times * base.rate, args.seconds, args.retries)
    show(f"{args.times:g} x capacity", over, args.prompt_len)
    await asyncio.to_thread(system.assert_idle, 30)
    slower = percentile(over.e2e_s, 99) / percentile(base.e2e_s, 99)
    print(f"throughput {over.rate / base.rate:.2f} of capacity, end-to-end p99 {slower:.2f} times that at capacity")
    return bool(over.broken or base.broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=24, help="of the closed loop that measures the capacity")
    parser.add_argument("--baseline", type=float, default=60.0, help="seconds of it")
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-queue-wait-s", type=float, default=5.0, help="the nodes' bound on waiting")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        system = Cluster(
            Path(directory),
            model=args.model,
            max_num_seqs=args.max_num_seqs,
            max_queue_wait_s=args.max_queue_wait_s,
            kv_cache_memory="64MiB",
        )
        try:
            system.wait_ready()
            return uvloop.run(measure(args, system))
        finally:
            system.stop()


if __name__ == "__main__":
    raise SystemExit(main())
