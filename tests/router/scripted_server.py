"""What scripted servers of other engines share: a real HTTP server in the test's loop, which can die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from tests.api import tiny
from tests.router.conftest import Running, until

S = TypeVar("S", bound="ScriptedServer")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class ScriptedServer(ABC):
    port = 0
    die_after: int | None = None  # so many tokens
    running = 0  # requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @abstractmethod
    def routes(self) -> list[Route]: ...

    async def start(self, port: int = 0) -> Self:
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=self.routes()), ws="none", lifespan="off", log_config=None, access_log=False,
            timeout_keep_alive=5, timeout_graceful_shutdown=0,
        )  # fmt: skip
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(0.001)
        return self

    def kill(self) -> None:
        """As SIGKILL: nothing is said, connections end."""
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]

    async def stop(self) -> None:
        self.kill()
        self._server.should_exit = self._server.force_exit = True
        await self._task


def write_model(path: Path) -> str:
    """The text side of the tiny model, as a directory."""
    bundle = tiny.bundle()
    (path / "tokenizer.json").write_bytes(bundle.tokenizer_json)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tiny.CHAT_TEMPLATE}))
    size = tiny.vocab_size(bundle.tokenizer_json)
    (path / "config.json").write_text(json.dumps({"vocab_size": size, "eos_token_id": tiny.EOS}))
    return str(path)


def text_of(ids: list[int]) -> str:
    from pd_serve.api.tokenizer import TextTokenizer

    return TextTokenizer(tiny.byte_level(), bos_token=None, add_bos_token=None).decode(ids, skip_special_tokens=True)


async def with_one_dying(running: Running, prompt: list[int], one: S, other: S) -> tuple[S, str]:
    """A stream of 12 tokens whose decode server dies after five: who went on, and the text."""
    one.die_after = other.die_after = 5
    task = asyncio.create_task(running.complete(prompt, 12))
    await until(lambda: one.running or other.running, "it decodes")
    survivor = other if one.running else one
    survivor.die_after = None
    return survivor, (await task)["choices"][0]["text"]
