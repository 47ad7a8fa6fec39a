"""pd-serve's transfer inside of two real servers of vLLM: what is decoded is what one server would have said, whatever
is cached, cut into chunks, left, made up or killed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pd_serve.config import RouterConfig
from tests.peers.handing import HELD, ask, pair_of, prefilled, prompts, soon, three_ways, tokens_of
from tests.peers.servers import NAME, Server, scale_out
from tests.router.conftest import Running, until

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=["caches", "no caches"])
def pair(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """With caches, the router finds /inference/v1/generate, too."""
    arguments = scale_out() if request.param == "caches" else ["--no-enable-prefix-caching"]
    with pair_of(smollm2, tmp_path_factory.mktemp("logs"), arguments) as servers:
        yield servers


def test_the_same_tokens_from_the_first_and_from_the_second_on(pair: list[Server]) -> None:
    p, d = pair
    with ThreadPoolExecutor(4) as four:
        for whole, plain, second in four.map(lambda prompt: three_ways(p, d, prompt), prompts(1)):
            assert plain == second == whole
    soon(lambda: p.metric(HELD) == 0, 10)
    assert d.metric("vllm:external_prefix_cache_hits_total") > 5000
    assert "was not fetched" not in d.log.read_text(errors="replace")


async def test_behind_the_router_decoding_begins_with_the_second_token(pair: list[Server], smollm2: Path) -> None:
    p, d = pair
    asked = prompts(4)[::3]
    wanted = [tokens_of(ask(p, prompt, 9)) for prompt in asked]
    urls = {"prefill_url": (p.url,), "decode_url": (d.url,)}
    router = Running(RouterConfig(**urls, tokenizer=(str(smollm2),), link_timeout_s=30.0, engine_timeout_s=30.0))
    router.http.timeout = httpx.Timeout(300)
    try:
        await router.started()
        await until(lambda: len(router.router.registry.nodes()) == 2, "both are linked", 60)
        made = d.metric("vllm:generation_tokens_total")
        body = {"model": NAME, "max_tokens": 9, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answers = await asyncio.gather(
            *(router.http.post("/v1/completions", json={**body, "prompt": prompt}) for prompt in asked)
        )
        assert [tokens_of(answer.json()) for answer in answers] == wanted
        assert d.metric("vllm:generation_tokens_total") - made == 8 * len(asked)
        metrics = (await router.http.get("/metrics")).text
        assert f'pd_serve_attempts_total{{placement="pair"}} {len(asked)}.0' in metrics
    finally:
        await router.stop()
    soon(lambda: p.metric(HELD) == 0, 10)


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


def test_a_prefill_server_that_hangs_takes_no_request_with_it(pair: list[Server]) -> None:
    p, d = pair
    prompt = prompts(5)[-1]
    whole = tokens_of(ask(p, prompt, 9))
    first, params = prefilled(p, prompt)
    with p.stopped():
        assert first + tokens_of(ask(d, prompt + first, 8, params)) == whole
    soon(lambda: p.metric(HELD) == 0 == d.metric(HELD), 30)
    whole, plain, second = three_ways(p, d, prompts(6)[-1])
    assert plain == second == whole


def test_a_prefill_server_that_is_killed_takes_no_request_with_it(pair: list[Server]) -> None:
    p, d = pair
    prompt = prompts(3)[-1]
    whole = tokens_of(ask(p, prompt, 9))
    first, params = prefilled(p, prompt)
    p.kill()
    assert first + tokens_of(ask(d, prompt + first, 8, params)) == whole
    assert "was not fetched" in d.log.read_text(errors="replace")
