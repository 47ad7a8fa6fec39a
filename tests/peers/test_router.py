"""The router in front of two prefill and two decode servers of vLLM, in float32."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from pd_serve.config import RouterConfig
from tests.peers.servers import NAME, Server, behind_the_router, scale_out
from tests.router.conftest import Running, until

pytestmark = pytest.mark.peer
BLOCK = 128  # vLLM's on CPUs
# At, before and after multiples of a block, beyond a chunk of prefill, and many below a block.
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 126, 127, 128, 129, 200, 255, 256, 257, 384, 512, 513, 700, 1024, 1100]
TOKENS = 16


class Servers(NamedTuple):
    prefill: list[Server]
    decode: list[Server]
    model: Path

    @property
    def all(self) -> list[Server]:
        return [*self.prefill, *self.decode]


@pytest.fixture(scope="module", params=["generate", "completions"])
def servers(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """With ``generate``, tokens go over /inference/v1/generate."""
    logs = tmp_path_factory.mktemp("vllm")
    opened = scale_out() if request.param == "generate" else []
    chunks = ["--max-num-batched-tokens", "512"]
    count = 2 if request.param == "generate" else 1
    found = Servers([], [], smollm2)
    for role, kind, group in (("prefill", "kv_producer", found.prefill), ("decode", "kv_consumer", found.decode)):
        for number in range(count):
            config = {**behind_the_router(), "kv_role": kind}
            group.append(Server(smollm2, logs / f"{role}-{number}.log", config, [*chunks, *opened]))
    try:
        for server in found.all:
            server.wait()
        yield found
    finally:
        for server in found.all:
            server.kill()


@pytest.fixture
async def running(servers: Servers):  # type: ignore[no-untyped-def]
    urls = {"prefill_url": tuple(p.url for p in servers.prefill), "decode_url": tuple(d.url for d in servers.decode)}
    # A server on a core that it shares with four others answers late
    router = Running(RouterConfig(**urls, tokenizer=(str(servers.model),), link_timeout_s=30.0, engine_timeout_s=30.0))
    router.http.timeout = httpx.Timeout(300)
    await router.started()
    await until(lambda: len(router.router.registry.nodes()) == len(alive(servers)), "all are linked", 60)
    yield router
    await router.stop()


def alive(servers: Servers) -> list[Server]:
    return [server for server in servers.all if server._process.poll() is None]


def prompts() -> list[list[int]]:
    draw = random.Random(14)
    return [[draw.randrange(1000, 20_000) for _ in range(length)] for length in LENGTHS]


async def alone(server: Server, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """What one engine makes of it, without a transfer."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    async with httpx.AsyncClient(timeout=300, trust_env=False) as http:
        answer = (await http.post(f"{server.url}/v1/completions", json=body)).json()
    return list(answer["choices"][0]["token_ids"])


async def made(running: Running, prompt: list[int], tokens: int = TOKENS, **more: Any) -> list[int]:
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    answer = await running.http.post("/v1/completions", json={**body, **more})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


async def test_the_same_tokens_as_one_engine(servers: Servers, running: Running) -> None:
    asked = prompts()
    wanted = [await alone(servers.prefill[0], prompt) for prompt in asked]
    at_once = asyncio.Semaphore(6)

    async def one(prompt: list[int]) -> list[int]:
        async with at_once:
            # what a client says of transfers is not passed on: these would end a decode engine
            return await made(
                running, prompt, kv_transfer_params={"do_remote_prefill": True, "remote_block_ids": [[9]]}
            )

    assert await asyncio.gather(*map(one, asked)) == wanted
    again = await asyncio.gather(*map(one, asked))  # prefix caches have them now
    assert again == wanted
    metrics = (await running.http.get("/metrics")).text
    assert 'pd_serve_attempts_total{placement="pair"} 48.0' in metrics and "pd_serve_retries_total{" not in metrics
    fetched = sum(server.metric("vllm:external_prefix_cache_hits_total") for server in servers.decode)
    assert fetched > 3000, "prompts are not computed twice"


async def test_a_list_of_prompts_and_log_probabilities(servers: Servers, running: Running) -> None:
    asked = prompts()[8:12]
    answer = await running.http.post(
        "/v1/completions",
        json={
            "model": NAME,
            "prompt": asked,
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": 2,
            "return_token_ids": True,
        },
    )
    choices = answer.json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [await alone(servers.prefill[0], p, 4) for p in asked]
    assert all(len(top) == 2 for choice in choices for top in choice["logprobs"]["top_logprobs"])
    assert all(value < 0 for choice in choices for value in choice["logprobs"]["token_logprobs"])


async def test_a_grammar_is_followed(running: Running) -> None:
    body = {"model": NAME, "prompt": "The year is", "max_tokens": 12, "temperature": 0}
    answer = await running.http.post("/v1/completions", json={**body, "structured_outputs": {"regex": "[0-9]{4}!"}})
    text = answer.json()["choices"][0]["text"]
    assert len(text) == 5 and text[:4].isdigit() and text[4] == "!"
    refused = await running.http.post("/v1/completions", json={**body, "structured_outputs": {"regex": "[0-9"}})
    assert refused.status_code == 400, refused.text


async def test_clients_that_leave_at_any_moment_leave_no_kv_behind(servers: Servers, running: Running) -> None:
    draw = random.Random(15)

    async def leaves(delay_s: float) -> None:
        prompt = [draw.randrange(1000, 20_000) for _ in range(600)]
        task = asyncio.create_task(made(running, prompt, 64))
        await asyncio.sleep(delay_s)
        task.cancel()

    await asyncio.gather(*(leaves(n * 0.15) for n in range(16)))

    def kept() -> float:
        return sum(server.metric("vllm:kv_cache_usage_perc") for server in alive(servers))

    await until(lambda: not running.router.shared.active, "the router has none of them", 30)
    # NixlConnector's lease is 30 s: what is given back sooner was given back
    await until(lambda: kept() == 0, "the blocks are free", 20)
    assert len(running.router.registry.nodes()) == len(alive(servers)), "no engine died"
    assert await made(running, prompts()[13]) == await alone(servers.prefill[0], prompts()[13])


async def test_servers_that_are_killed(servers: Servers, running: Running) -> None:
    if len(servers.decode) < 2:
        pytest.skip("nobody would be left")
    asked = [prompts()[n] for n in (9, 15, 18, 21)]
    wanted = [await alone(servers.prefill[0], prompt, 96) for prompt in asked]
    for group in (servers.decode, servers.prefill):
        task = asyncio.gather(*(made(running, prompt, 96) for prompt in asked))
        await until(lambda: any(len(s.outputs) > 8 for s in running.router.shared.active), "under way", 60)
        group[-1].kill()
        assert await task == wanted
        await until(lambda: len(running.router.registry.nodes()) == len(alive(servers)), "unlinked", 30)
    metrics = (await running.http.get("/metrics")).text
    assert "pd_serve_retries_total{" in metrics, "some were on the server that was killed"
