"""A server that speaks SGLang's documented protocol, with the model of :mod:`tests.router.scripted_node`.

Not recorded from a real one. Two servers meet in the room that their requests name, at the prefill server's bootstrap
address; a decode server waits there for as long as nobody comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.api import tiny
from tests.router.scripted_node import next_token
from tests.router.scripted_server import ScriptedServer

Rooms = dict[tuple[str, int, int], "asyncio.Future[int]"]


class ScriptedSGLang(ScriptedServer):
    """``mode``: of disaggregation. ``incremental``: events tell new tokens alone."""

    def __init__(self, rooms: Rooms, mode: str, *, bootstrap_port: int = 8998, incremental: bool = False) -> None:
        self.rooms = rooms
        self.mode = mode
        self.bootstrap_port = bootstrap_port
        self.incremental = incremental
        self.hold = asyncio.Event()  # cleared: nothing is computed
        self.hold.set()
        self.fail: dict[str, Any] | None = None  # the next request ends by this
        self.die_after = None
        self.eos_at: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.aborted = 0

    def routes(self) -> list[Route]:
        info = {"version": "0.5.11", "disaggregation_mode": self.mode, "model_path": "/models/tiny",
                "disaggregation_bootstrap_port": self.bootstrap_port, "context_length": None}  # fmt: skip
        model = {"id": "tiny", "object": "model", "owned_by": "sglang", "root": "tiny", "max_model_len": 512}
        metrics = 'sglang:num_running_reqs{model_name="tiny"} 2.0\nsglang:token_usage{model_name="tiny"} 0.5\n'
        metrics += 'sglang:max_total_num_tokens{model_name="tiny"} 1000.0\n'
        return [
            Route("/health", lambda _: Response()),
            Route("/get_server_info", lambda _: JSONResponse(info)),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [model]})),
            Route("/metrics", lambda _: PlainTextResponse(metrics)),
            Route("/generate", self._generate, methods=["POST"]),
        ]

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        ended = False
        try:
            async for event in self._steps(body):
                yield f"data: {json.dumps(event)}\n\n"
            ended = True
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            self.aborted += not ended

    def _room(self, body: dict[str, Any]) -> asyncio.Future[int]:
        key = body["bootstrap_host"], body["bootstrap_port"], body["bootstrap_room"]
        return self.rooms.setdefault(key, asyncio.get_running_loop().create_future())

    async def _steps(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        prompt, sampling = body["input_ids"], body["sampling_params"]
        made: list[int] = []
        if self.fail is not None:
            reason, self.fail = self.fail, None
            yield self._event(made, [], body, reason)
            return
        if self.mode == "decode":
            made.append(await self._room(body))
            await self.hold.wait()
            stops = made[0] == tiny.EOS
            yield self._event(made, made, body, {"type": "stop", "matched": tiny.EOS} if stops else None)
            if stops:
                return
        await self.hold.wait()
        while len(made) < sampling["max_new_tokens"]:
            await asyncio.sleep(0.002)
            stops = self.eos_at is not None and len(prompt) + len(made) >= self.eos_at
            made.append(tiny.EOS if stops else next_token([*prompt, *made]))
            if self.mode == "prefill":
                if body["bootstrap_host"] != "2.2.2.2":
                    self._room(body).set_result(made[0])
                yield self._event(made, made, body, {"type": "length", "length": 0})
                return
            if self.die_after is not None and len(made) > self.die_after:
                self.kill()
                await asyncio.sleep(60)
            finish = {"type": "length", "length": len(made)} if len(made) == sampling["max_new_tokens"] else None
            yield self._event(made, made[-1:], body, {"type": "stop", "matched": tiny.EOS} if stops else finish)
            if stops:
                return

    def _event(self, made: list[int], new: list[int], body: dict[str, Any], finish: dict[str, Any] | None) -> Any:
        meta: dict[str, Any] = {"id": body["rid"], "finish_reason": finish, "prompt_tokens": len(body["input_ids"]),
                                "completion_tokens": len(made), "cached_tokens": 4}  # fmt: skip
        told = new if self.incremental else made
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, id, None] for id in told]
            meta["output_top_logprobs"] = [[[-0.5, id, None], [-1.5, id + 1, None]] for id in told]
        return {"text": "", "output_ids": told, "meta_info": meta}
