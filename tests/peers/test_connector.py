"""pd-serve's transfer inside of two real servers of vLLM: what is decoded is what one server would have said, whatever
is cached, cut into chunks, left, made up or killed. The proxy here is vLLM's toy proxy: one request, then the other."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integrations.vllm.steps import TO_HAND_OVER
from tests.peers.servers import NAME, Server

pytestmark = pytest.mark.peer

OURS = {
    "kv_connector": "PdServeConnector",
    "kv_connector_module_path": "pd_serve.integrations.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"lease_s": 8, "step_timeout_s": 4, "pull_timeout_s": 20},
}
# around the ends of chunks (256 tokens) and of blocks (128)
ENDS = tuple(end + step for end in (128, 256, 512, 1024) for step in (-1, 0, 1))
LENGTHS = (1, 2, 100, 300, 384, 600, 640, 700, 768, 800, 900, 1000, *ENDS)
CHUNKS = ("--max-num-batched-tokens", "256")
HELD = "vllm:kv_cache_usage_perc"


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


def soon(is_so: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.1)


@pytest.fixture(scope="module", params=["caches", "no caches"])
def pair(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    logs = tmp_path_factory.mktemp("logs")
    more = () if request.param == "caches" else ("--no-enable-prefix-caching",)
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    servers = [Server(smollm2, logs / name, OURS, (*more, *CHUNKS), env) for name in ("p.log", "d.log")]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def test_the_same_tokens_from_the_first_and_from_the_second_on(pair: list[Server]) -> None:
    p, d = pair

    def handed_over(prompt: list[int]) -> tuple[list[int], list[int], list[int]]:
        whole = tokens_of(ask(p, prompt, 9))
        _, params = prefilled(p, prompt)
        plain = tokens_of(ask(d, prompt, 9, params))
        first, params = prefilled(p, prompt)
        return whole, plain, first + tokens_of(ask(d, prompt + first, 8, params))

    with ThreadPoolExecutor(4) as four:
        for whole, plain, second in four.map(handed_over, prompts(1)):
            assert plain == second == whole
    soon(lambda: p.metric(HELD) == 0, 10)
    assert d.metric("vllm:external_prefix_cache_hits_total") > 5000
    assert "was not fetched" not in d.log.read_text(errors="replace")


def test_requests_that_are_left_and_words_that_are_made_up_leave_nothing_behind(pair: list[Server]) -> None:
    p, d = pair
    prompt = prompts(2)[-2]
    whole = tokens_of(ask(p, prompt, 4))
    for after_s in (0.02, 0.3):
        _, params = prefilled(p, prompt)
        assert p.metric(HELD) > 0
        body = {"model": NAME, "prompt": prompt, "max_tokens": 500, "stream": True, "kv_transfer_params": params}
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{d.url}/v1/completions", json=body, timeout=after_s, trust_env=False)
        soon(lambda: p.metric(HELD) == 0 == d.metric(HELD), 20)
    _, params = prefilled(p, prompt)
    known = params["pd_serve"]
    for said in (None, {"v": 1}, {**known, "epoch": "another"}, {**known, "addresses": ["tcp://127.0.0.1:9"]}):
        assert tokens_of(ask(d, prompt, 4, {**params, "pd_serve": said})) == whole
    soon(lambda: p.metric(HELD) == 0, 30)  # nobody came for it
    assert tokens_of(ask(d, prompt, 4, params)) == whole  # too late
    assert d.metric(HELD) == 0


def test_a_prefill_server_that_is_killed_takes_no_request_with_it(pair: list[Server]) -> None:
    p, d = pair
    prompt = prompts(3)[-1]
    whole = tokens_of(ask(p, prompt, 9))
    first, params = prefilled(p, prompt)
    p.kill()
    assert first + tokens_of(ask(d, prompt + first, 8, params)) == whole
    assert "was not fetched" in d.log.read_text(errors="replace")
