"""The server of another engine as a node: what is common to all of them.

Its link is HTTP: a request for each part of an attempt, and a look at its health and load every second. It is lost when
a look finds nobody, or nothing is heard of it for as long as of a node. What is asked and what is answered in which
words is the engine's own (:mod:`pd_serve.router.backends.vllm`, :mod:`pd_serve.router.backends.sglang`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import NamedTuple

import msgspec

from pd_serve.config import RouterConfig
from pd_serve.router.backends import texts
from pd_serve.router.backends.base import Place, Unfit
from pd_serve.router.backends.handover import Handovers
from pd_serve.router.backends.http import Exchange, Server
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.trust import client_tls
from pd_serve.wire import link as wire
from pd_serve.wire.model import ModelBundle

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_ALONE = 1 << 40  # tokens: a server that is used without a partner computes every prompt itself
NO_LOAD = wire.Load(waiting=0, running=0, waiting_tokens=0, groups=[])


class Facts(NamedTuple):
    """What a server says of itself. ``max_model_len``: 0 where it does not say."""

    name: str
    max_model_len: int
    root: str
    version: str


class Model(msgspec.Struct):
    """Of /v1/models."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[Model]


class Served(ABC):
    """The backend of one kind of server."""

    kind: str
    title: str

    def __init__(self, settings: RouterConfig, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.handovers = Handovers()
        self.links: dict[str, ServedLink] = {}  # open ones, by node id
        self._tasks: set[asyncio.Task[None]] = set()

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return client_tls(self.settings.ssl_ca)

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Nobody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @abstractmethod
    async def greet(self, server: Server, place: Place) -> tuple[Facts, Callable[[wire.Hello, texts.Text], ServedLink]]:
        """What it serves, and what makes a link to it. Raises OSError, PDServeError, msgspec.DecodeError."""

    async def models(self, server: Server) -> Model:
        """The base model. Raises OSError where the server is not healthy, Unfit, msgspec.DecodeError."""
        timeout_s = self.settings.connect_timeout_s
        status, _ = await server.get("/health", timeout_s)
        if status != 200:
            raise ConnectionError(f"its /health answers {status}")
        status, body = await server.get("/v1/models", timeout_s)
        if status != 200:
            advice = ": give its key with --backend-api-key" if status in (401, 403) else ""
            raise Unfit(f"/v1/models: {failure_of(status, body)[1]}{advice}")
        found = [model for model in msgspec.json.decode(body, type=_Models).data if not model.parent]
        if not found:
            raise Unfit("it serves no model")
        return found[0]

    async def open(self, place: Place) -> ServedLink:
        settings = self.settings
        tls = self._tls if place.url.startswith("https:") else None
        server = Server(place.url, settings.backend_api_key, settings.connect_timeout_s, tls)
        try:
            facts, make = await self.greet(server, place)
            path = texts.directory(settings.tokenizer, facts.name, facts.root)
            mark = texts.fingerprint(self.kind, facts.name)
            text = await asyncio.to_thread(texts.read, path, facts.name, mark, facts.max_model_len)
            return make(self._hello(server, place, facts, text.info), text)
        except BaseException:
            server.close()
            raise

    def _hello(self, server: Server, place: Place, facts: Facts, info: wire.ModelInfo) -> wire.Hello:
        alone = place.role == "both"
        words = f"{self.title} {facts.version}".strip()
        return wire.Hello(
            link_version=wire.LINK_VERSION,
            node_id=place.url.partition("://")[2],
            role=place.role,
            url=place.url,
            model=info,
            # Servers of different versions, and those that are used alone, hand each other nothing.
            layout=f"{words}, alone" if alone else words,
            epoch="",
            peer_addresses=(place.url,),
            transport=self.kind,
            local_prefill_tokens=_ALONE if alone else 0,
            load=NO_LOAD,
            layout_text=f"that of {words}",
        )


class ServedLink(ABC):
    """See :class:`pd_serve.router.backends.base.Link`."""

    # Such a server answers from the loop that writes all its streams, and may be late without being dead. A process
    # that dies is noticed at once: it takes its connections with it.
    patience = 4.0

    def __init__(self, backend: Served, server: Server, hello: wire.Hello, text: texts.Text) -> None:
        self.backend = backend
        self.server = server
        self.hello = hello
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.spoke_s = time.monotonic()
        self.node: Node | None = None
        self.works: dict[str, Work] = {}  # by attempt id
        self._text = text
        self._last_submit = 0
        self._looking: asyncio.Task[None] | None = None
        self._look = asyncio.Event()

    @property
    def heard_s(self) -> float:
        return self.server.heard_s

    @heard_s.setter
    def heard_s(self, at_s: float) -> None:
        self.server.heard_s = at_s

    async def bundle(self) -> ModelBundle:
        return self._text.bundle

    def begin(self, node: Node) -> None:
        self.node = node
        self.backend.links[node.id] = self
        self._looking = asyncio.create_task(self._keep_looking())

    def send(self, message: wire.ToNode) -> None:
        match message:
            case wire.Submit():
                self._last_submit = message.number
                work = self.works[message.id] = self._work(message)
                work.start()
            case wire.Abort(ids=ids):
                for id in ids:
                    work_of = self.works.pop(id, None)
                    if work_of is not None:
                        work_of.stop()

    def ping(self) -> None:
        self._look.set()

    def close(self, why: str) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self.node is not None and self.backend.links.get(self.node.id) is self:
            del self.backend.links[self.node.id]
        works, self.works = self.works, {}
        for work in works.values():
            work.stop()
        self.server.close()
        if not self.closed.done():
            self.closed.set_result(why)

    def abort(self, why: str) -> None:
        self.close(why)

    # --- of an engine -----------------------------------------------------------------------------------

    def _work(self, submit: wire.Submit) -> Work:
        why = self.cannot(submit.sampling)
        if why:
            return Unable(self, submit, why)
        if submit.num_output and submit.sampling.grammar is not None:
            return Unable(self, submit, "a structured output cannot go on on another server", kind="internal")
        return self.work(submit)

    @abstractmethod
    def cannot(self, sampling: wire.SamplingParams) -> str:
        """What is asked and cannot be had there; empty: nothing."""

    @abstractmethod
    def work(self, submit: wire.Submit) -> Work:
        """What serves it."""

    @abstractmethod
    def load(self, samples: Mapping[str, float]) -> wire.Load:
        """Of the server's metrics, by name and labels."""

    @property
    def _limit_s(self) -> float:
        return self.patience * self.backend.settings.link_timeout_s

    # --- its health -------------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Something went wrong there: it is looked at now."""
        self._look.set()

    async def _keep_looking(self) -> None:
        while True:
            self._look.clear()
            number = self._last_submit
            try:
                status, _ = await self.server.get("/health", self._limit_s)
                if status != 200:
                    self.close(f"its /health answers {status}")
                    return
                self.spoke_s = time.monotonic()
                await self._take_load(number)
            except TimeoutError:
                pass  # how long it may be silent, the links know
            except OSError as error:
                self.close(str(error))
                return
            except Exception:
                log.exception("cannot look at %s", self.server.url)  # the next look may fare better
            try:
                await asyncio.wait_for(self._look.wait(), _LOOK_S)
                await asyncio.sleep(0.05)  # doubts come in crowds
            except TimeoutError:
                pass

    async def _take_load(self, number: int) -> None:
        status, text = await self.server.get("/metrics", self._limit_s)
        samples = samples_of(text.decode(errors="replace")) if status == 200 else {}
        load = self.load(samples)
        tokens = sum(work.prompt_tokens for work in self.works.values() if work.computing)
        load = msgspec.structs.replace(load, waiting_tokens=tokens)
        if not samples:  # it tells nothing: what this router has there is all that is known
            load = msgspec.structs.replace(load, running=len(self.works))
        if self.node is not None:
            self.backend.registry.status(self.node, wire.Status(load, last_submit=number))


class Work(ABC):
    """An attempt's part on one server: it ends by itself (``finished``), or is stopped."""

    computing = False  # it computes the prompt there

    def __init__(self, link: ServedLink, submit: wire.Submit) -> None:
        self.link = link
        self.submit = submit
        self.prompt_tokens = len(submit.tokens) // 4
        self.exchange: Exchange | None = None

    @abstractmethod
    def start(self) -> None: ...

    def stop(self) -> None:
        """Nobody wants it any more."""
        if self.exchange is not None:
            self.exchange.give_up()

    def say(self, output: wire.Output) -> None:
        if self.link.works.get(self.submit.id) is self and self.link.node is not None:
            self.link.node.outputs([output], time.monotonic())

    def say_soon(self, output: wire.Output) -> None:
        """Not while the stream is still busy with asking."""
        asyncio.get_running_loop().call_soon(self.say, output)

    def fail(self, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        failure = wire.Failure(kind, message, retry_after_s)
        self.say(wire.Output(self.submit.id, self.submit.num_output, [], failure=failure))
        self.finished()
        if kind not in ("refused", "invalid"):
            self.link.doubt()

    def finished(self) -> None:
        if self.link.works.get(self.submit.id) is self:
            del self.link.works[self.submit.id]


class Unable(Work):
    """Nothing: the server could not do what is asked."""

    def __init__(self, link: ServedLink, submit: wire.Submit, why: str, kind: str = "invalid") -> None:
        super().__init__(link, submit)
        self._why, self._kind = why, kind

    def start(self) -> None:
        asyncio.get_running_loop().call_soon(self.fail, self._kind, self._why)


def why_not(grammar: wire.Grammar | None) -> str:
    """What keeps another engine from following it; empty: nothing."""
    if grammar is not None and grammar.kind == "or_calls":
        return "a format beside tools that may be called is not passed on: leave one of them out, or force a call"
    if grammar is not None and grammar.after:
        return "a structured output after reasoning is not passed on: turn reasoning off (enable_thinking: false)"
    return ""


def load_of(waiting: int, running: int, room: int, share: float) -> wire.Load:
    """``share`` of ``room``, in blocks or tokens, is in use; 0: it is not told."""
    used = min(room, round(share * room))
    groups = [wire.GroupUsage(room, used, 0, room - used)] if room else []
    return wire.Load(waiting=waiting, running=running, waiting_tokens=0, groups=groups, queued=waiting)


def tokens_of(submit: wire.Submit) -> list[int]:
    tokens = array("i", submit.tokens)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def headers_of(submit: wire.Submit) -> dict[str, str]:
    """The same on both servers, which find each other's part of an attempt in their logs by it."""
    found = {"X-Request-Id": "".join(c if c.isascii() and c.isprintable() else "_" for c in submit.id)}
    return found | ({"traceparent": submit.trace} if submit.trace else {})


def failure_of(status: int, body: bytes) -> tuple[str, str]:
    """Kind and words of an answer that is none."""
    said = body[:2000].decode(errors="replace")
    try:
        document = msgspec.json.decode(body)
        error = document.get("error", document) if isinstance(document, dict) else document
        said = str(error.get("message") or error.get("detail") or said) if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    kind = {400: "invalid", 422: "invalid", 429: "refused", 503: "refused"}.get(status, "internal")
    return kind, f"the server answers {status}: {said[:300]}"


def samples_of(text: str) -> dict[str, float]:
    """Of Prometheus' text format: the sums of each name over all labels, means of shares (``*_perc``, ``*_usage``); of
    the names in ``*_info`` the labels that are numbers, as ``name:label``."""
    found: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("}") if rest else ("", "", "")
        if not rest:
            name, _, value = line.partition(" ")
        if name.endswith("_bucket"):
            continue
        if name.endswith("_info"):
            for label in labels.split(","):
                key, _, content = label.partition("=")
                if content.strip('"').isdigit():
                    found[f"{name}:{key}"] = found.get(f"{name}:{key}", 0.0) + float(content.strip('"'))
            continue
        try:
            found[name] = found.get(name, 0.0) + float(value.split()[0])
        except (ValueError, IndexError):
            continue
        counts[name] += 1
    shares = {name for name in found if name.endswith(("_perc", "_usage"))}
    return found | {name: found[name] / counts[name] for name in shares}
