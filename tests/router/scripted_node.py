"""A node without an engine: speaks the link over a real WebSocket, with a trivial model and failures on demand.

The next token is a function of all tokens before it, so a resumed sequence goes on exactly when its tokens
are right. KV blocks are an entry in a dictionary that prefill and decode nodes share.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import ssl
from array import array
from collections.abc import Sequence
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from pd_serve.auth import Seal
from pd_serve.wire import link
from pd_serve.wire.handshake import LinkRefused, NodeHalf
from pd_serve.wire.model import ModelBundle, encode_bundle
from tests.api import tiny

_names = itertools.count()
FIRST, COUNT = 40, 60  # the ids that the model makes: printable, never EOS


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    value = seed
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return FIRST + value % COUNT


def expected(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


class Fabric:
    """What travels between nodes: keys whose KV is ready, and those given up."""

    def __init__(self) -> None:
        self._arrived: dict[str, asyncio.Future[None]] = {}

    def arrival(self, key: str) -> asyncio.Future[None]:
        return self._arrived.setdefault(key, asyncio.get_running_loop().create_future())


class ScriptedNode:
    def __init__(
        self,
        fabric: Fabric,
        role: str,
        *,
        node_id: str | None = None,
        info: link.ModelInfo | None = None,
        bundle: ModelBundle | None = None,
        layout: str = "layout",
        local_prefill_tokens: int = 0,
        token_s: float = 0.002,
        secret: str = "",
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        grammars: bool = True,
    ) -> None:
        self.fabric = fabric
        self.role = role
        self.id = node_id or f"{role}-{next(_names)}"
        self.info = info or tiny.info()
        self.bundle = bundle or tiny.bundle(self.info.name, fingerprint=self.info.fingerprint)
        self.layout = layout
        self.local_prefill_tokens = local_prefill_tokens
        self.token_s = token_s
        self.secret = secret
        self.host = host
        self.tls = tls
        self.link_version = link.LINK_VERSION
        self.epoch = "epoch-1"
        self.port = 0
        # Failures on demand.
        self.refuse: link.Failure | None = None
        self.fail: list[link.Failure | None] = []  # taken by one submit each
        self.hold = asyncio.Event()  # cleared: nothing is computed
        self.hold.set()
        self.hold_after: int | None = None  # output index at which it stops until ``hold`` is set again
        self.local = False  # decode: computes the prompt itself although it has a source
        self.first_token: int | None = None  # says this instead of the model's first token
        self.script: Sequence[int] = ()  # says these, and ends
        self.eos_at: int | None = None  # output index at which EOS is made
        self.batch = 1  # tokens a step
        self.draining = False
        self.counters: dict[str, float] = {"steps": 1.0}
        self.silent_engine = False
        self.accept = asyncio.Event()  # decode, cleared: it neither accepts nor refuses what has a source
        self.accept.set()
        self.misfits: dict[str, str] = {}
        self.grammars = grammars
        self.queued = self.max_queue = 0
        self.queue_wait_s = 0.0
        # What was seen.
        self.submits: list[link.Submit] = []
        self.aborted: list[str] = []
        self.peers: list[link.Peers] = []
        self.models_sent = 0
        self.refused: list[str] = []  # why routers were
        self.running: dict[str, asyncio.Task[None]] = {}
        self._connections: set[ServerConnection] = set()
        self._statuses: set[asyncio.Task[None]] = set()
        self._seals: dict[ServerConnection, Seal] = {}
        self._last_submits: dict[ServerConnection, int] = {}

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    async def start(self, port: int = 0) -> ScriptedNode:
        self._server = await serve(
            self._serve, self.host, port, process_request=self._http, compression=None, max_size=None, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """As a process that exits: connections end, nothing is finished."""
        for task in list(self.running.values()):
            task.cancel()
        for connection in list(self._connections):
            connection.transport.abort()
        self._server.close()
        await self._server.wait_closed()

    def pause(self) -> None:
        """As SIGSTOP: the connection stays, nothing is read or answered."""
        self.hold.clear()
        self.silent_engine = True
        for connection in self._connections:
            connection.transport.pause_reading()

    def cut(self) -> None:
        for connection in list(self._connections):
            connection.transport.abort()

    async def drain(self) -> None:
        self.draining = True
        for connection in list(self._connections):
            await self._send(connection, self.status(connection))

    def load(self) -> link.Load:
        return link.Load(
            waiting=0,
            running=len(self.running),
            waiting_tokens=0,
            groups=[link.GroupUsage(100, len(self.running), 0, 100 - len(self.running))],
            draining=self.draining,
            queued=self.queued,
            max_queue=self.max_queue,
            queue_wait_s=self.queue_wait_s,
        )

    def status(self, connection: ServerConnection) -> link.Status:
        return link.Status(
            self.load(), self.counters, last_submit=self._last_submits.get(connection, 0), misfits=self.misfits
        )

    # --- HTTP and the link ------------------------------------------------------------------------------

    def _http(self, _: ServerConnection, request: Request) -> Response | None:
        return None if request.path == "/link" else Response(HTTPStatus.NOT_FOUND, "Not Found", Headers(), b"")

    async def _prove(self, connection: ServerConnection) -> Seal | None:
        """The router's frames' seal; None where it could not prove itself."""
        half = NodeHalf(self.secret.encode())
        try:
            challenge = half.challenge(await connection.recv(decode=False))
            if self.link_version != link.LINK_VERSION:
                challenge = link.encoder.encode(link.Challenge(self.link_version, b"n" * 32, b""))
            await connection.send(challenge)
            half.check(await connection.recv(decode=False))
        except LinkRefused as error:
            self.refused.append(str(error))
            await connection.close(1008, str(error)[:120])
            return None
        except ConnectionClosed:
            return None
        self._seals[connection] = half.outgoing
        return half.incoming

    async def _serve(self, connection: ServerConnection) -> None:
        incoming = await self._prove(connection)
        if incoming is None:
            return
        self._connections.add(connection)
        hello = link.Hello(
            self.link_version, self.id, self.role, self.url, self.info, self.layout, self.epoch,
            (f"tcp://{self.id}",), "test", self.local_prefill_tokens, self.load(), grammars=self.grammars,
        )  # fmt: skip
        mine: list[str] = []
        status = asyncio.create_task(self._report(connection))
        self._statuses.add(status)
        try:
            await self._send(connection, hello)
            async for sealed in connection:
                frame = incoming.open(sealed)  # type: ignore[arg-type]
                assert frame is not None
                match link.decode_to_node(frame):
                    case link.GetModel():
                        self.models_sent += 1
                        await self._send(connection, link.Model(encode_bundle(self.bundle)))
                    case link.Submit() as submit:
                        self.submits.append(submit)
                        self._last_submits[connection] = submit.number
                        mine.append(submit.id)
                        task = self.running[submit.id] = asyncio.create_task(self._run(connection, submit))
                        # not in a finally of its own: one that is cancelled before it begins has none
                        task.add_done_callback(functools.partial(self._ran, submit.id))
                    case link.Abort(ids=ids):
                        self.aborted += ids
                        for id in ids:
                            if id in self.running:
                                self.running[id].cancel()
                    case link.Peers() as peers:
                        self.peers.append(peers)
        except ConnectionClosed:
            pass
        finally:
            status.cancel()
            self._statuses.discard(status)
            self._connections.discard(connection)
            for id in mine:
                if id in self.running:
                    self.running[id].cancel()

    async def _report(self, connection: ServerConnection) -> None:
        while True:
            await asyncio.sleep(0.2)
            if not self.silent_engine:
                await self._send(connection, self.status(connection))

    async def _send(self, connection: ServerConnection, message: link.FromNode) -> None:
        try:
            await connection.send(self._seals[connection].close(link.encoder.encode(message)))
        except ConnectionClosed:
            pass

    # --- the "engine" -----------------------------------------------------------------------------------

    async def _run(self, connection: ServerConnection, submit: link.Submit) -> None:
        async def say(**fields: object) -> None:
            await self._send(connection, link.Outputs([link.Output(submit.id, **fields)]))  # type: ignore[arg-type]

        if submit.source is not None:
            await self.accept.wait()
        failure = self.refuse or (self.fail.pop(0) if self.fail else None)
        if failure is not None:
            await say(index=submit.num_output, tokens=[], failure=failure)
            return
        await self._compute(submit, say)

    def _ran(self, id: str, task: asyncio.Task[None]) -> None:
        if self.running.get(id) is task:
            del self.running[id]

    async def _compute(self, submit: link.Submit, say) -> None:  # type: ignore[no-untyped-def]
        tokens = list(array("i", submit.tokens))
        index, params = submit.num_output, submit.sampling
        if submit.source is not None:
            await say(index=index, tokens=[], event="accepted")
        await self.hold.wait()
        if submit.source is not None:
            if self.local:
                await say(index=index, tokens=[], event="local")
            else:
                tokens.append(await asyncio.wait_for(asyncio.shield(self.fabric.arrival(submit.id)), 20))  # type: ignore[func-returns-value, arg-type]
                index += 1
                await say(index=index, tokens=[], event="arrived")
        while index < params.max_tokens:
            if self.hold_after is not None and index >= self.hold_after:
                self.hold.clear()
                await self.hold.wait()
                self.hold_after = None
            await asyncio.sleep(self.token_s)
            step: list[int] = []
            finish = None
            for _ in range(self.batch):
                token = next_token(tokens, params.seed if params.temperature else 0)
                if self.first_token is not None and index + len(step) == submit.num_output:
                    token = self.first_token
                if self.script:
                    at = index + len(step)
                    token, finish = (self.script[at], None) if at < len(self.script) else (tiny.EOS, "stop")
                if self.eos_at is not None and index + len(step) >= self.eos_at and not params.ignore_eos:
                    token, finish = tiny.EOS, "stop"
                step.append(token)
                tokens.append(token)
                if finish is None and index + len(step) == params.max_tokens:
                    finish = "length"
                if finish is not None or submit.handoff:
                    break
            logprobs = None
            if params.logprobs >= 0:
                logprobs = [link.TokenLogprob(t, -0.5, 1, [(t, -0.5), (t + 1, -1.5)][: params.logprobs]) for t in step]
            first = index == submit.num_output
            prompt_logprobs = None
            if first and params.prompt_logprobs >= 0:
                prompt = list(array("i", submit.tokens))
                prompt_logprobs = [None, *(link.TokenLogprob(t, -2.0, 3, []) for t in prompt[1:])]
            await say(
                index=index, tokens=step, logprobs=logprobs, finish=finish,
                stop_token=None, num_cached=4 if first else 0, prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
            index += len(step)
            if finish is not None:
                return
            if submit.handoff:
                arrival = self.fabric.arrival(submit.id)
                if not arrival.done():
                    arrival.set_result(step[-1])  # type: ignore[arg-type]
                return
