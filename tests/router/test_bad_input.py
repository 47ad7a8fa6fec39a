"""Over HTTP: whatever is sent gets an answer in OpenAI's error shape, never a 5xx, and serving goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.conftest import Running, StartNode, StartRouter, idle

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/nodes"]
HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def running(start_node: StartNode, start_router: StartRouter) -> Running:
    return await start_router(await start_node("prefill"), await start_node("decode"), max_body_bytes=1 << 20)


async def raw(running: Running, *parts: bytes) -> bytes:
    """Sends bytes as they are and reads until the answer's body has come."""
    port = int(running.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return head + await asyncio.wait_for(reader.readexactly(length), 5)
    finally:
        writer.close()


@pytest.mark.parametrize("path", PATHS)
async def test_broken_bodies(running: Running, path: str) -> None:
    for body in (b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 200_000, b'{"model": "\xff"}'):
        answer = await running.http.post(path, content=body)
        assert answer.status_code == 400, (body[:20], answer.text)
        assert answer.json()["error"]["message"]


async def test_a_body_that_is_too_large_is_not_read_to_its_end(running: Running) -> None:
    answer = await running.http.post("/v1/completions", content=b"x" * 10_000_000)
    assert answer.status_code == 413 and "1048576" in answer.json()["error"]["message"]
    # Announced: refused before a byte of it was sent.
    announced = await raw(running, (HEAD.format("/tokenize") + "Content-Length: 99999999999\r\n\r\n").encode())
    assert announced.startswith(b"HTTP/1.1 413")
    # Not announced: refused while it is being sent, long before the end.
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    head = (HEAD.format("/v1/completions") + "Transfer-Encoding: chunked\r\n\r\n").encode()
    assert (await raw(running, head, *[chunk] * 20)).startswith(b"HTTP/1.1 413")
    await running.complete()


async def test_a_mistake_of_the_routers_own_is_named_and_shown_to_nobody(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise RuntimeError("a secret of ours")

    with monkeypatch.context() as patch:
        patch.setattr(running.router.registry, "names", broken)
        answer = await running.http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.headers.get_list("X-Request-Id") == [answer.json()["error"]["request_id"]] == ["mine-1"]
    await running.complete()


async def test_a_client_that_leaves_while_it_sends(running: Running) -> None:
    port = int(running.url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write((HEAD.format("/v1/completions") + "Content-Length: 1000\r\n\r\n{").encode())
    await writer.drain()
    writer.close()
    await running.complete()


async def test_a_body_that_never_comes_ends(start_router: StartRouter) -> None:
    running = await start_router(ready=False, request_timeout_s=1.0)
    answer = await asyncio.wait_for(
        raw(running, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"), 5
    )
    assert answer.startswith(b"HTTP/1.1 408")


async def test_paths_and_methods(running: Running) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ):
        answer = await running.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] and answer.headers["x-request-id"]
    assert "POST" in (await running.http.get("/v1/completions")).headers["allow"]


async def test_a_prompt_far_beyond_the_model_does_not_stop_streams(running: Running) -> None:
    answer = await running.post(prompt="the fox " * 100_000)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text("ab{\ud7ff", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)
names = st.sampled_from(
    "model prompt messages max_tokens n stop stream temperature logprobs echo tools logit_bias seed tokens url "
    "stream_options user min_tokens return_token_ids".split()
)


@pytest.mark.slow
async def test_fuzz(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = [await start_node("prefill", token_s=0), await start_node("decode", token_s=0)]
    running = await start_router(*nodes)
    requests: list[tuple[str, bytes]] = []

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(PATHS[:4]),
        st.dictionaries(names, values, max_size=5),
        st.sampled_from([{}, {"prompt": "the fox"}, {"messages": [{"role": "user", "content": "x"}]}]),
        st.integers(0, 40),
    )
    def collect(path: str, body: dict[str, Any], base: dict[str, Any], cut: int) -> None:
        encoded = json.dumps({"max_tokens": 3, **base, **body}).encode()
        requests.append((path, encoded[:-cut] if cut > 30 else encoded))

    collect()
    requests.append(("/v1/completions", b'{"prompt": "the fox", "max_tokens": 3}'))  # chance may find no right one
    statuses = set()
    for path, body in requests:
        answer = await running.http.post(path, content=body)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
    assert statuses >= {200, 400}
    assert idle(*nodes)()
    await running.complete()
