"""What clients of a served 8B model see on two GPUs: a prefill and a decode node, or two nodes that do both (or one).

    python -m benchmarks.gpu_serving pair --parts single,streams,goodput   # starts pd-serve up, and ends it
    python -m benchmarks.gpu_serving both --parts streams,goodput
    python -m benchmarks.gpu_serving --urls http://A,http://B ...          # other servers, requests by turns
    python -m benchmarks.gpu_serving --urls http://P,http://D --vllm-pair ...   # vLLM's prefill and decode server

Llama-3.1-8B's shape in bfloat16, made-up weights, random prompts. Prints lines that begin with RESULT; ``--json`` keeps
what is drawn by ``benchmarks/goodput_plot.py``.

*single*: one request at a time: time to the first token, from it to the second, and between later ones. *streams*: 32
streams of 512 tokens decode while prompts of 8,192 tokens arrive twice a second: the gaps that the streams see.
*goodput*: 2,048 tokens in, 128 out, at random times; a request counts whose first token came within 0.5 s and whose
gaps (99 of 100) were at most 25 ms, or 50.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.shapes import write_model
from pd_serve.bench.client import Client
from pd_serve.bench.load import Record, send
from pd_serve.bench.prompts import Bodies
from pd_serve.config import BenchConfig
from pd_serve.net import listen

LENGTHS = (512, 2048, 8192)
RATES = (4, 8, 12, 16, 20, 24, 28)
TTFT_S, GAPS_S = 0.5, (0.025, 0.050)  # objectives: a curve for each bound of gaps
START_S = 240
UP = {"pair": ("--prefill", "1", "--decode", "1"), "both": ("--both", "2"), "one": ("--both", "1")}

Send = Callable[[bytes], Awaitable[Record]]


@contextlib.contextmanager
def served(system: str, layers: int, flags: list[str], model: Path | None = None) -> Iterator[str]:
    """``pd-serve up``, ready; says how long that took. ``model``: instead of Llama-3.1-8B's shape."""
    with tempfile.TemporaryDirectory() as name, listen("127.0.0.1", 0) as port:
        number = port.getsockname()[1]
        port.close()
        log = Path(os.environ.get("OUT", name)) / f"up-{system}-{number}.log"  # others may run beside
        model = model or write_model(Path(name) / "llama", layers) / "config.json"
        command = [sys.executable, "-m", "pd_serve.cli", "up", "--port", str(number), "--model", str(model)]
        command += ["--load-format", "dummy", "--max-model-len", "10240", *UP[system], *flags]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and what was started ends, too
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            end = time.monotonic() + START_S
            while not (ready := re.search(r"Ready after ([\d.]+) s", log.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{system} does not start:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.1)
            print(f"RESULT {system} ready after {ready[1]} s", flush=True)
            yield f"http://127.0.0.1:{number}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def by_turns(clients: list[Client]) -> Send:
    turn = itertools.cycle(clients)

    def one(body: bytes) -> Awaitable[Record]:
        return send(next(turn), BenchConfig(), body)

    return one


def vllm_pair(prefill: Client, decode: Client) -> Send:
    """The prefill server's answer, then the decode server's stream, as vLLM's proxies do it."""
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    asked |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))

    async def one(body: bytes) -> Record:
        fields = json.loads(body)
        sent = time.perf_counter()
        first = {**fields, "max_tokens": 1, "stream": False, "kv_transfer_params": asked}
        del first["stream_options"]
        status, answer, _ = await prefill.post("/v1/completions", json.dumps(first).encode(), lambda *_: None)
        if status != 200:
            return Record(sent, end_s=time.perf_counter(), error=f"HTTP {status}: {answer[:200]!r}")
        fields["kv_transfer_params"] = json.loads(answer)["kv_transfer_params"]
        record = await send(decode, BenchConfig(), json.dumps(fields).encode())
        record.sent_s = sent
        return record

    return one


def bodies_of(count: int, input_len: int, output_len: int, model: str, seed: int) -> Iterator[bytes]:
    """Made beforehand: to make one of 8,192 tokens would keep the clocks of all streams waiting for milliseconds."""
    bodies = Bodies(BenchConfig(input_len=input_len, output_len=output_len, max_token_id=100_000), model, seed)
    return iter([bodies.next() for _ in range(count)])


def gaps_ms(records: list[Record]) -> list[float]:
    return [(b - a) * 1e3 for record in records for a, b in itertools.pairwise(record.token_times_s)]


def checked(records: list[Record]) -> list[Record]:
    """The good ones; says what went wrong with others."""
    bad = [record.error for record in records if record.error is not None]
    if bad:
        print(f"RESULT {len(bad)} of {len(records)} failed: {bad[0]}"[:300], flush=True)
    return [record for record in records if record.error is None]


async def single(name: str, ask: Send, model: str) -> None:
    for length in LENGTHS:
        records = checked([await ask(body) for body in bodies_of(12, length, 33, model, length)][2:])
        if not records:
            continue
        ttft = statistics.median(record.ttft_s for record in records) * 1e3
        second = statistics.median(record.token_times_s[1] - record.token_times_s[0] for record in records) * 1e3
        later = statistics.median(gaps_ms([replace(r, token_times_s=r.token_times_s[1:]) for r in records]))
        print(
            f"RESULT {name} single {length}: TTFT {ttft:.1f} ms, second token {second:.1f}, ITL {later:.2f}", flush=True
        )


async def streams(name: str, ask: Send, model: str, seconds: float, rate: float) -> None:
    short, long = bodies_of(2000, 512, 256, model, 1), bodies_of(2 + int(seconds * rate), 8192, 2, model, 2)
    await asyncio.gather(*(ask(next(body)) for body in (short, short, long, long)))
    end = time.perf_counter() + seconds
    decoded: list[Record] = []
    arrived: list[Record] = []

    async def stream(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while time.perf_counter() < end:
            decoded.append(await ask(next(short)))

    async def prompt(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        arrived.append(await ask(next(long)))

    gaps = random.Random(4)
    due = list(itertools.accumulate(gaps.expovariate(rate) for _ in range(int(seconds * rate))))
    work = [stream(i / 32) for i in range(32)] + [prompt(1 + delay) for delay in due]
    await asyncio.gather(*work)
    decoded, arrived = checked(decoded), checked(arrived)
    p50, p90, p99 = np.percentile(gaps_ms(decoded), (50, 90, 99)).tolist()
    second = np.percentile([gaps_ms([record])[0] for record in decoded], (50, 99)).tolist()
    later = float(np.percentile([gap for record in decoded for gap in gaps_ms([record])[1:]], 99))
    ttft = statistics.median(record.ttft_s for record in arrived) * 1e3
    print(
        f"RESULT {name} streams: {len(decoded)} of 512+256 beside {len(arrived)} of 8192 at {rate:g}/s: ITL median "
        f"{p50:.2f} p90 {p90:.2f} p99 {p99:.2f} max {max(gaps_ms(decoded)):.1f} ms; to the second token median "
        f"{second[0]:.1f} p99 {second[1]:.1f}, between later ones p99 {later:.2f}; long TTFT median {ttft:.0f} ms",
        flush=True,
    )


def within(record: Record, gap_s: float) -> bool:
    return record.ttft_s <= TTFT_S and bool(np.percentile(gaps_ms([record]), 99) <= gap_s * 1e3)


async def goodput(name: str, ask: Send, model: str, seconds: float) -> list[dict[str, float]]:
    curve = []
    for rate in RATES:
        bodies, gaps = bodies_of(int(rate * seconds), 2048, 128, model, rate), random.Random(rate)
        tasks: list[asyncio.Task[Record]] = []
        due = time.perf_counter()
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(ask(body)))
            due += gaps.expovariate(rate)
        records = checked(list(await asyncio.gather(*tasks)))
        good = [rate * sum(within(record, gap_s) for record in records) / len(tasks) for gap_s in GAPS_S]
        ttft = np.percentile([record.ttft_s * 1e3 for record in records], (50, 99)).tolist()
        itl = np.percentile(gaps_ms(records), (50, 99)).tolist()
        point = {"rate": rate, "good": good[0], "good_50ms": good[1]}
        curve.append(point | {"ttft_p50": ttft[0], "ttft_p99": ttft[1], "itl_p99": itl[1]})
        print(
            f"RESULT {name} goodput at {rate}/s: {good[0]:.1f}/s good at 25 ms, {good[1]:.1f} at 50; "
            f"TTFT {ttft[0]:.0f}, p99 {ttft[1]:.0f}; ITL {itl[0]:.2f}, p99 {itl[1]:.2f} ms",
            flush=True,
        )
        if good[1] < 0.3 * rate:
            break
    return curve


def keep(path: str, name: str, curve: list[dict[str, float]]) -> None:
    if path:
        Path(path).write_text(json.dumps({"name": name, "curve": curve}) + "\n")


async def measure(name: str, urls: list[str], options: argparse.Namespace) -> None:
    clients = [Client(url, "", 120.0) for url in urls]
    try:
        _, body, _ = await clients[0].get("/v1/models")
        model = str(json.loads(body)["data"][0]["id"])
        ask = vllm_pair(*clients) if options.vllm_pair else by_turns(clients)
        parts = options.parts.split(",")
        if "single" in parts:
            await single(name, ask, model)
        if "streams" in parts:
            await streams(name, ask, model, options.seconds, options.long_rate)
        if "goodput" in parts:
            keep(options.json, name, await goodput(name, ask, model, options.seconds))
    finally:
        for client in clients:
            client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", choices=[*UP], help="what to start; else --urls")
    parser.add_argument("--urls", default="")
    parser.add_argument("--vllm-pair", action="store_true")
    parser.add_argument("--name", default="")
    parser.add_argument("--parts", default="single,streams,goodput")
    parser.add_argument("--seconds", type=float, default=8.0, help="of streams, and of each rate")
    parser.add_argument("--long-rate", type=float, default=2.0, help="long prompts a second")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--flags", default="", help="further ones of pd-serve up")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    if options.urls:
        uvloop.run(measure(options.name or "other", options.urls.split(","), options))
        return
    with served(options.system, options.layers, options.flags.split()) as url:
        uvloop.run(measure(options.name or options.system, [url], options))


if __name__ == "__main__":
    main()
