"""What a hand-over between two vLLM servers takes, with NixlConnector and with pd-serve's connector, on two GPUs.

    python -m benchmarks.vllm_handover [--model DIR] [--connector nixl ours] [--ucx-tls tcp] [--json FILE]

Needs vLLM, nixl and pd-serve in one environment. Without ``--model`` the shape of Llama-3.1-8B with dummy weights. Each
connector has the two servers to itself, one after the other: prefill on GPU 0, decode on GPU 1. For each prompt length,
one request at a time: until the prefill server's answer; from then to the decode server's first own token; until a
client has its first token (with ours the prefill server's, which goes out at once). Then 64 requests of 2,048 tokens at
once: the 99th percentile of the hand-over. With ``--ucx-tls`` both have UCX_TLS set, so that NIXL falls to what it
names. What pd-serve's lanes say in the servers' logs is printed.
"""

from __future__ import annotations

import argparse
import asyncio
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
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                if (await client.get(f"{self.url}/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(1)
        sys.exit(f"a server does not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


async def handed_over(client: httpx.AsyncClient, p: Server, d: Server, count: int, seed: int) -> tuple[float, float]:
    """Seconds until the prefill server's answer, and from then to the decode server's first own token."""
    rng = random.Random(seed)
    prompt = [rng.randrange(1000, 120000) for _ in range(count)]
    body = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    begun = time.perf_counter()
    answer = await client.post(
        f"{p.url}/v1/completions", json={**body, "prompt": prompt, "max_tokens": 1, "kv_transfer_params": KEEP}
    )
    answer.raise_for_status()
    said, answered = answer.json(), time.perf_counter()
    params = said["kv_transfer_params"]
    if "pd_serve" in params:  # it goes on with the second token
        prompt = prompt + said["choices"][0]["token_ids"]
    asked = {**body, "prompt": prompt, "max_tokens": DECODED, "stream": True, "kv_transfer_params": params}
    async with client.stream("POST", f"{d.url}/v1/completions", json=asked) as lines:
        lines.raise_for_status()
        first = 0.0
        async for line in lines.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
    return answered - begun, first - answered


async def measure(name: str, p: Server, d: Server) -> dict[str, Any]:
    found: dict[str, Any] = {"connector": name}
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        await asyncio.gather(p.ready(client), d.ready(client))
        await handed_over(client, p, d, 512, 0)  # the first one shakes hands
        for count in LENGTHS:
            times = [await handed_over(client, p, d, count, seed) for seed in range(REPEATS)][1:]
            prefill, hand_over = (statistics.median(t[i] for t in times) * 1e3 for i in range(2))
            ttft = prefill if name == "ours" else prefill + hand_over
            found[str(count)] = {"prefill_ms": prefill, "hand_over_ms": hand_over, "ttft_ms": ttft}
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
