"""Two real servers of vLLM with pd-serve's connector, and what a proxy such as vLLM's toy one says to them: one
request, then the other."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.integrations.vllm.steps import TO_HAND_OVER
from tests.peers.servers import NAME, OURS, Server

SOON = {"lease_s": 8, "step_timeout_s": 4, "pull_timeout_s": 20}
# around the ends of chunks (256 tokens) and of blocks (128)
ENDS = tuple(end + step for end in (128, 256, 512, 1024) for step in (-1, 0, 1))
LENGTHS = (1, 2, 100, 300, 384, 600, 640, 700, 768, 800, 900, 1000, *ENDS)
CHUNKS = ("--max-num-batched-tokens", "256")
HELD = "vllm:kv_cache_usage_perc"


@contextlib.contextmanager
def pair_of(
    model: Path, logs: Path, arguments: Sequence[str], settings: Mapping[str, float] = SOON
) -> Iterator[list[Server]]:
    """A prefill and a decode server. ``settings``: of the connector."""
    connector = {**OURS, "kv_role": "kv_both", "kv_connector_extra_config": dict(settings)}
    servers = [Server(model, logs / name, connector, (*arguments, *CHUNKS)) for name in ("p.log", "d.log")]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def prompts(seed: int) -> list[list[int]]:
    """Every third begins with the same 300 tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(100, 20000) for _ in range(300)]
    made = [[rng.randrange(100, 20000) for _ in range(count)] for count in LENGTHS]
    return [(shared + one[300:])[: len(one)] if i % 3 == 0 else one for i, one in enumerate(made)]


def ask(server: Server, prompt: list[int], tokens: int, params: dict[str, Any] | None = None) -> dict[str, Any]:
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True} | ({"kv_transfer_params": params} if params is not None else {})
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def prefilled(p: Server, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
    """The first token, and what goes to the decode server."""
    answer = ask(p, prompt, 1, TO_HAND_OVER)
    return tokens_of(answer), answer["kv_transfer_params"]


def three_ways(p: Server, d: Server, prompt: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The tokens of one server alone, of two over the plain protocol, and of two from the second token on."""
    whole = tokens_of(ask(p, prompt, 9))
    _, params = prefilled(p, prompt)
    plain = tokens_of(ask(d, prompt, 9, params))
    first, params = prefilled(p, prompt)
    return whole, plain, first + tokens_of(ask(d, prompt + first, 8, params))


def soon(is_so: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.1)
