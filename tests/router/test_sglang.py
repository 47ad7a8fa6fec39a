"""SGLang's servers behind the router, as its documentation has them: none was run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.router.conftest import Running, StartRouter, until
from tests.router.scripted_node import expected
from tests.router.scripted_server import text_of, with_one_dying, write_model
from tests.router.scripted_sglang import Rooms, ScriptedSGLang

PROMPT = list(range(50, 82))
WANTED = text_of(expected(PROMPT, 12))
Start = Callable[..., Awaitable[ScriptedSGLang]]
Behind = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    rooms: Rooms = {}
    servers: list[ScriptedSGLang] = []

    async def one(mode: str, **options: Any) -> ScriptedSGLang:
        servers.append(await ScriptedSGLang(rooms, mode, **options).start())
        return servers[-1]

    yield one
    for server in servers:
        await server.stop()


@pytest.fixture
def behind(start_router: StartRouter, tmp_path: Path) -> Behind:
    async def router(prefill: list[ScriptedSGLang], decode: list[ScriptedSGLang], **options: Any) -> Running:
        urls = {"prefill_url": tuple(p.url for p in prefill), "decode_url": tuple(d.url for d in decode)}
        counts = {"min_prefill": len(prefill), "min_decode": len(decode), "backend": "sglang"}
        return await start_router(**{**urls, **counts, "tokenizer": (write_model(tmp_path),), **options})

    return router


@pytest.mark.parametrize("incremental", [False, True])
async def test_both_at_once_and_the_first_token_before_the_decode_server_says_anything(
    start: Start, behind: Behind, incremental: bool
) -> None:
    p = await start("prefill", bootstrap_port=9001, incremental=incremental)
    d = await start("decode", incremental=incremental)
    running = await behind([p], [d])
    d.hold.clear()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    async with running.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.aiter_lines()
        first = json.loads((await asyncio.wait_for(anext(lines), 5))[6:])["choices"][0]["text"]
        assert first == text_of(expected(PROMPT, 1))
        d.hold.set()
        events = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
    assert first + "".join(e["choices"][0]["text"] for e in events) == WANTED
    (theirs,), (ours,) = p.bodies, d.bodies
    rooms = [{key: body[key] for key in body if key.startswith("bootstrap")} for body in (theirs, ours)]
    assert rooms[0] == rooms[1] and rooms[0]["bootstrap_port"] == 9001 and rooms[0]["bootstrap_host"] == "127.0.0.1"
    assert 0 <= rooms[0]["bootstrap_room"] < 2**63
    assert theirs["input_ids"] == ours["input_ids"] == PROMPT
    scored = (await running.complete(PROMPT, 3, logprobs=2, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
    made = expected(PROMPT, 3)
    assert scored["tokens"] == [f"token_id:{id}" for id in made] and scored["token_logprobs"] == [-0.5] * 3
    assert scored["top_logprobs"][2] == {f"token_id:{made[2]}": -0.5, f"token_id:{made[2] + 1}": -1.5}
    d.eos_at = len(PROMPT) + 3
    ended = (await running.complete(PROMPT, 12))["choices"][0]
    assert ended["finish_reason"] == "stop" and ended["text"] == text_of(expected(PROMPT, 3))
    p.eos_at = len(PROMPT)
    ended = await running.complete(PROMPT, 12)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1
    assert (await running.complete(PROMPT, 1))["choices"][0]["finish_reason"] == "stop", "of the prefill server alone"
    assert len({body["bootstrap_room"] for body in p.bodies}) == len(p.bodies)


async def test_a_prefill_that_fails_ends_its_decode_and_both_go_on_elsewhere(start: Start, behind: Behind) -> None:
    p1, p2, d = await start("prefill"), await start("prefill"), await start("decode")
    running = await behind([p1, p2], [d])
    for p in (p1, p2):
        p.fail = {"type": "abort", "message": "out of memory", "status_code": 500}
    assert (await running.complete(PROMPT, 12))["choices"][0]["text"] == WANTED
    await until(lambda: not d.running and d.aborted == 2, "the decodes that nobody came to have ended")
    task = asyncio.create_task(running.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12}))
    p1.hold.clear()
    p2.hold.clear()
    await until(lambda: d.running, "begun")
    task.cancel()
    await until(lambda: not (d.running or p1.running or p2.running), "both were told that the client left")


async def test_a_stream_goes_on_where_its_decode_server_dies(start: Start, behind: Behind) -> None:
    p, d1, d2 = await start("prefill"), await start("decode"), await start("decode")
    running = await behind([p], [d1, d2])
    survivor, text = await with_one_dying(running, PROMPT, d1, d2)
    assert text == WANTED
    assert survivor.bodies[0]["input_ids"] == [*PROMPT, *expected(PROMPT, 5)]


async def test_what_it_is_and_what_it_was_listed_for(start: Start, behind: Behind) -> None:
    wrong, alone = await start("decode"), await start("null")
    running = await behind([wrong], [], url=(alone.url,), min_prefill=1, min_decode=1)
    (reason,) = await until(lambda: [u.reason for u in running.router.links.unlinked() if u.state == "refused"], "no")
    assert "--disaggregation-mode decode" in reason
    assert (await running.complete(PROMPT, 12))["choices"][0]["text"] == WANTED
    assert "bootstrap_room" not in alone.bodies[-1]
    (node,) = [n for n in (await running.http.get("/v1/status")).json()["nodes"] if n["state"] == "ready"]
    assert node["transport"] == "sglang" and node["load"]["groups"][0]["used"] in (0, 500)
