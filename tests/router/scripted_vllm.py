"""A server that speaks what vLLM's does, with the model of :mod:`tests.router.scripted_node` and failures on demand.

Written after exchanges with vLLM 0.32.0 and NixlConnector (tests/router/exchanges/vllm.json holds some, and a test
compares). KV is an entry in what a fabric knows of each prefill engine; as there, a decode engine whose prompt does not
fit the blocks that it is to read dies, and what nobody reads stays kept.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pd_serve.integrations.vllm import params
from tests.api import tiny
from tests.router.scripted_node import next_token
from tests.router.scripted_server import ScriptedServer

_numbers = itertools.count()


class Fabric:
    def __init__(self) -> None:
        self.engines: dict[str, ScriptedVLLM] = {}


class ScriptedVLLM(ScriptedServer):
    """``generate``: "stream", "whole" (no streams) or "" (the path is not there). ``ours``: the connector is
    pd-serve's."""

    def __init__(
        self,
        fabric: Fabric,
        *,
        generate: str = "stream",
        ours: bool = False,
        key: str = "",
        version: str = "0.32.0",
        token_s: float = 0.002,
        block: int = 16,
    ) -> None:
        super().__init__()
        self.fabric = fabric
        self.engine_id = str(uuid.uuid4())
        self.generate = generate
        self.ours = ours
        self.key = key
        self.version = version
        self.token_s = token_s
        self.block = block
        self.model = "tiny"
        # On demand.
        self.hold = asyncio.Event()  # cleared: nothing is computed
        self.hold.set()
        self.take = asyncio.Event()  # cleared: requests are not given to the engine yet
        self.take.set()
        self.refuse = 0  # a status
        self.die_after = None  # output tokens of one request, after which the process is gone
        self.eos_at: int | None = None
        self.waiting = 0  # as its metrics say
        # What was seen.
        self.kept: dict[str, int] = {}  # prompt tokens by request id, until somebody has read them
        self.bodies: list[tuple[str, dict[str, Any], dict[str, str]]] = []  # path, body and headers
        self.running = 0
        self.aborted = 0
        self.dead = False

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Bodies of all but the router's first question."""
        return [body for _, body, _ in self.bodies if not _is_probe(body)]

    def routes(self) -> list[Route]:
        self.fabric.engines[self.engine_id] = self
        routes = [
            Route("/health", self._health),
            Route("/version", lambda _: JSONResponse({"version": self.version})),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        if self.generate:
            routes.append(Route("/inference/v1/generate", self._generate, methods=["POST"]))
        return routes

    def kill(self) -> None:
        self.fabric.engines.pop(self.engine_id, None)
        super().kill()

    # --- HTTP -------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        return Response(status_code=503 if self.dead else 200)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        model = {"id": self.model, "object": "model", "owned_by": "vllm", "root": "/models/tiny", "parent": None}
        adapter = {**model, "id": "adapter", "parent": self.model}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": 512}, adapter]})

    async def _metrics(self, _: Request) -> Response:
        labels = f'{{engine="0",model_name="{self.model}"}}'
        return PlainTextResponse(
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{labels} {float(self.running)}\n"
            f"vllm:num_requests_waiting{labels} {float(self.waiting)}\n"
            f"vllm:kv_cache_usage_perc{labels} 0.25\n"
            f'vllm:cache_config_info{{block_size="{self.block}",engine="0",num_gpu_blocks="400"}} 1.0\n'
        )

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append((request.url.path, body, dict(request.headers)))
        if body.get("stream") and self.generate == "whole":
            body = {**body, "stream": False}
        return await self._serve(request, body, body["token_ids"], body["sampling_params"], generate=True)

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append((request.url.path, body, dict(request.headers)))
        return await self._serve(request, body, body["prompt"], body, generate=False)

    async def _serve(
        self, request: Request, body: dict[str, Any], prompt: list[int], sampling: dict[str, Any], *, generate: bool
    ) -> Response:
        if self.refuse:
            return JSONResponse({"error": {"message": "no room", "code": self.refuse}}, self.refuse)
        id = f"{'generate-tokens' if generate else 'cmpl'}-{request.headers.get('x-request-id', '')}-{next(_numbers)}"
        given = body
        if generate and self.version.startswith(("0.24.", "0.28.")):
            given = sampling.get("extra_args") or {}
        run = _Run(self, id, prompt, sampling, given.get("kv_transfer_params"), generate)
        if body.get("stream"):
            return StreamingResponse(run.events(), media_type="text/event-stream")
        whole = asyncio.create_task(run.whole())
        gone = asyncio.create_task(_gone(request))
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not whole.done():
            whole.cancel()
            return Response(status_code=499)
        return whole.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_probe(body: dict[str, Any]) -> bool:
    return body.get("token_ids", body.get("prompt")) == [1]


def kept(engine_id: str, request_id: str, count: int, block: int) -> dict[str, Any]:
    """What NixlConnector says of ``count`` tokens, and a key that nobody knows yet."""
    return {
        "do_remote_prefill": True, "do_remote_decode": False,
        "remote_engine_id": engine_id, "remote_request_id": request_id,
        "remote_block_ids": [list(range(1, 2 + (count - 1) // block))],
        "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1, "dcp_size": 1, "pp_size": 1,
        "remote_num_tokens": count, "remote_blocks_expiry_time": None, "transfer_mode": "pull",
        "remote_prefill_cached_tokens": 4, "of_a_later_version": {"b": [1.5, None], "a": "\u00e9"},
    }  # fmt: skip


class _Run:
    def __init__(
        self,
        server: ScriptedVLLM,
        id: str,
        prompt: list[int],
        sampling: dict[str, Any],
        given: dict[str, Any] | None,
        generate: bool,
    ) -> None:
        self.server = server
        self.id = id
        self.prompt = prompt
        self.sampling = sampling
        self.params = given or {}
        self.is_generate = generate

    async def tokens(self) -> AsyncIterator[tuple[list[int], str | None]]:
        """Tokens of a step, and why it is the last."""
        server = self.server
        await server.take.wait()
        server.running += 1
        ended = False
        try:
            if self.params.get("do_remote_prefill"):
                self._read()
            await server.hold.wait()
            made: list[int] = []
            limit = self.sampling["max_tokens"]
            while not ended:
                await asyncio.sleep(server.token_s)
                at_end = server.eos_at is not None and len(self.prompt) + len(made) >= server.eos_at
                stops = (
                    at_end and not self.sampling.get("ignore_eos") and len(made) >= self.sampling.get("min_tokens", 0)
                )
                made.append(tiny.EOS if stops else next_token([*self.prompt, *made]))
                if made[-1] in self.sampling.get("stop_token_ids", ()):
                    stops = True
                ended = stops or len(made) == limit
                if server.die_after is not None and len(made) > server.die_after:
                    server.kill()
                    await asyncio.sleep(60)
                yield made[-1:], "stop" if stops else "length" if ended else None
        finally:
            server.running -= 1
            server.aborted += not ended
            if not ended and self.params.get("do_remote_prefill"):
                self._free()  # as an aborted request of a decode engine does, whatever it had read

    def _source(self) -> ScriptedVLLM | None:
        held = params.held_of(self.params) if params.NAME in self.params else None
        return self.server.fabric.engines.get(held.node_id if held else self.params["remote_engine_id"])

    def _free(self) -> int | None:
        source = self._source()
        held = self.params.get(params.NAME)
        key = held["key"] if held else self.params["remote_request_id"]
        return None if source is None else source.kept.pop(key, None)

    def _read(self) -> None:
        """Raises GenerationError's like where the blocks are not there."""
        ours = self.params.get(params.NAME)
        known = ours["num_tokens"] if ours else self.params["remote_num_tokens"]
        if not ours and -(-len(self.prompt) // self.server.block) != -(-known // self.server.block):
            self.server.dead = True
            raise AssertionError("local and remote blocks differ")
        if self._free() is None:
            raise RuntimeError("KV load failure")

    def keep(self) -> dict[str, Any] | None:
        if not self.params.get("do_remote_decode"):
            return None
        server, count = self.server, len(self.prompt)
        server.kept[self.id] = count
        if server.ours:
            held = params.Held(params.VERSION, self.id, server.engine_id, "epoch", ("tcp://10.0.0.1:1",), count)
            return params.answer(held, 4)
        return kept(server.engine_id, self.id, count, server.block)

    # --- words ------------------------------------------------------------------------------------------

    def _choice(self, tokens: list[int], finish: str | None) -> dict[str, Any]:
        return {"index": 0, "logprobs": self._logprobs(tokens), "finish_reason": finish, "stop_reason": None,
                "token_ids": tokens, "routed_experts": None}  # fmt: skip

    def _logprobs(self, tokens: list[int]) -> dict[str, Any] | None:
        count = self.sampling.get("logprobs")
        if count is None:
            return None
        if self.is_generate:
            top = [{"token_id": t, "logprob": -0.5, "rank": 1} for t in tokens]
            top += [{"token_id": t + 1, "logprob": -1.5, "rank": 2} for t in tokens]
            content = [
                {
                    "token_id": t,
                    "logprob": -0.5,
                    "rank": 1,
                    "top_logprobs": [e for e in top if e["token_id"] in (t, t + 1)],
                }
                for t in tokens
            ]
            return {"content": content}
        names = [f"token_id:{t}" for t in tokens]
        tops = [{f"token_id:{t}": -0.5, f"token_id:{t + 1}": -1.5} for t in tokens]
        return {"text_offset": [0], "token_logprobs": [-0.5] * len(tokens), "tokens": names, "top_logprobs": tops}

    def _prompt_logprobs(self) -> list[Any] | None:
        if self.sampling.get("prompt_logprobs") is None:
            return None
        return [None, *({str(t): {"logprob": -2.0, "rank": 3, "decoded_token": "x"}} for t in self.prompt[1:])]

    async def whole(self) -> Response:
        made: list[int] = []
        finish: str | None = None
        try:
            async for tokens, end in self.tokens():
                made += tokens
                finish = end
        except (RuntimeError, AssertionError) as error:
            return JSONResponse({"error": {"message": str(error), "type": "InternalServerError", "code": 500}}, 500)
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": len(made), "prompt_tokens_details": None}
        kept = None if finish == "stop" and self.server.ours else self.keep()
        document = {"choices": [self._choice(made, finish)], "usage": usage, "kv_transfer_params": kept}
        return JSONResponse({**document, "prompt_logprobs": self._prompt_logprobs()})

    async def events(self) -> AsyncIterator[str]:
        try:
            async for tokens, finish in self.tokens():
                yield f"data: {json.dumps({'choices': [self._choice(tokens, finish)], 'usage': None})}\n\n"
            usage = {"prompt_tokens": len(self.prompt)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        except (RuntimeError, AssertionError) as error:
            said = {"message": str(error), "type": "InternalServerError", "param": None, "code": 500}
            yield f"data: {json.dumps({'error': said})}\n\n"
        yield "data: [DONE]\n\n"
