"""What a hand-over between two vLLM servers takes, with NixlConnector and with pd-serve's connector, on two GPUs.

    python -m benchmarks.vllm_handover [--model DIR] [--connector nixl ours] [--ucx-tls tcp] [--json FILE]

Needs vLLM, nixl and pd-serve in one environment. Without ``--model`` the shape of Llama-3.1-8B with dummy weights. Each
connector has the two servers to itself, one after the other: prefill on GPU 0, decode on GPU 1. For each prompt length,
one request at a time: until the prefill server's answer; from then to the decode server's first own token; until a
client has its first token (with ours the prefill server's, which goes out at once). Then 64 requests of 2,048 tokens at
once: the 99th percentile of the hand-over. With ``--ucx-tls`` both have UCX_TLS set, so that NIXL falls to what it
names (``tcp,cuda_copy``). What pd-serve's lanes say in the servers' logs is printed.

``same_tokens``: of 16 tokens each of 8 prompts, how many in a row are those of the prefill server alone, on average
(bfloat16 and dummy weights: near-ties flip); ``different_tokens``: how many different ones there were.
``nothing_handed_over_ms``: until the decode server's first token of a prompt of 16 tokens of its own: what of every
hand-over is vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
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
KEEP = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
KEEP |= {"remote_host": None, "remote_port": None}


class Server:
    def __init__(self, model: Path, gpu: int, connector: dict[str, Any], log: Path, arguments: argparse.Namespace):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            port, side = one.getsockname()[1], other.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        environ = {
            **os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side),
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        if arguments.ucx_tls:
            environ["UCX_TLS"] = arguments.ucx_tls
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "16384",
            "--max-num-batched-tokens", "16384", "--gpu-memory-utilization", str(arguments.gpu_memory_utilization),
            "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port),
            "--kv-transfer-config", json.dumps(connector), *([] if arguments.model else ["--load-format", "dummy"]),
        ]  # fmt: skip
        with log.open("wb") as out:
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


async def prefill(client: httpx.AsyncClient, p: Server, prompt: list[int]) -> tuple[dict[str, Any], list[int]]:
    """What a decode server is asked after the prefill server's answer, and that one's token."""
    body = {**BODY, "prompt": prompt, "max_tokens": 1, "return_token_ids": True, "kv_transfer_params": KEEP}
    answer = await client.post(f"{p.url}/v1/completions", json=body)
    answer.raise_for_status()
    said = answer.json()
    params, first = said["kv_transfer_params"], said["choices"][0]["token_ids"]
    if "pd_serve" in params:  # it goes on with the second token
        prompt = prompt + first
    return {"prompt": prompt, "kv_transfer_params": params}, first


async def handed_over(client: httpx.AsyncClient, p: Server, d: Server, count: int, seed: int) -> tuple[float, float]:
    """Seconds until the prefill server's answer, and from then to the decode server's first own token."""
    prompt = prompt_of(count, seed)
    begun = time.perf_counter()
    asked, _ = await prefill(client, p, prompt)
    answered = time.perf_counter()
    return answered - begun, await first_token_s(client, d, asked)


async def first_token_s(client: httpx.AsyncClient, server: Server, asked: dict[str, Any]) -> float:
    """Seconds until the first token of a stream, which is read to its end."""
    begun, first = time.perf_counter(), 0.0
    body = {**BODY, "max_tokens": DECODED, "stream": True, **asked}
    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as lines:
        lines.raise_for_status()
        async for line in lines.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begun
    return first


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
        await asyncio.gather(p.ready(client), d.ready(client))
        await handed_over(client, p, d, 512, 0)  # the first one shakes hands
        found["same_tokens"], found["different_tokens"] = await compared(client, p, d)
        short = [await first_token_s(client, d, {"prompt": prompt_of(16, seed)}) for seed in range(REPEATS)][1:]
        found["nothing_handed_over_ms"] = statistics.median(short) * 1e3
        for count in LENGTHS:
            times = [await handed_over(client, p, d, count, seed) for seed in range(REPEATS)][1:]
            prefill_ms, hand_over_ms = (statistics.median(t[i] for t in times) * 1e3 for i in range(2))
            ttft_ms = prefill_ms if name == "ours" else prefill_ms + hand_over_ms
            found[str(count)] = {"prefill_ms": prefill_ms, "hand_over_ms": hand_over_ms, "ttft_ms": ttft_ms}
        burst = await asyncio.gather(*(handed_over(client, p, d, BURST_TOKENS, 100 + i) for i in range(BURST)))
        found["burst_hand_over_p99_ms"] = sorted(t[1] for t in burst)[int(0.99 * BURST)] * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--connector", nargs="+", choices=("nixl", "ours"), default=["nixl", "ours"])
    parser.add_argument("--ucx-tls", default="")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.mkdtemp(prefix="vllm-handover-")))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or write_model(Path(scratch), 32)
        results = []
        for name in arguments.connector:
            connector = OURS if name == "ours" else NIXL
            servers = [Server(model, g, connector, arguments.logs / f"{name}{g}.log", arguments) for g in range(2)]
            try:
                results.append(asyncio.run(measure(name, *servers)))
            except (RuntimeError, httpx.HTTPError) as error:  # the other one is measured all the same
                results.append({"connector": name, "failed": repr(error)})
                print(f"{name} failed: {error}")
            finally:
                for server in servers:
                    server.stop()
            print(json.dumps(results[-1], indent=1), flush=True)
            for server in servers:
                for line in server.log.read_text(errors="replace").splitlines():
                    if any(word in line for word in ("pd-serve", " reads over ", "left out", "GB/s", "not fetched")):
                        print(f"{server.log.name}: {line[-300:]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
