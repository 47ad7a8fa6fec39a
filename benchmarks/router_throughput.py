"""What a router costs: CPU time of its process a streamed token and a request, beside other routers.

The same load goes through every router in turns, to backends that compute nothing: for pd-serve two scripted decode
nodes that speak the link, for the others two servers that speak OpenAI's API. Backends make a stream's first token at
once and the others at the steps of a clock, one of every stream a step, as an engine does.

    python benchmarks/router_throughput.py vllm=/path/to/vllm-router sglang=/path/to/sglang-router

A pd-serve command under a name with "pair" is in front of a prefill and a decode node that share each stream; its
requests are of two tokens, of others one, as one has nothing to decode.

pd-serve-NAME@DIRECTORY is the pd-serve of a checkout in DIRECTORY, with its own backends: commits differ in what
routers and nodes say to each other.

CPU seconds are all of the router's processes, by the kernel's clocks: they hold on a busy machine, where rates do
not.
*late* is when events reach the client after the step that made them; "direct" is the client at the backend itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import uvloop

from pd_serve.net import listen
from pd_serve.processes import Child
from pd_serve.wire import link
from tests.router.scripted_node import FIRST, Fabric, ScriptedNode

_HERE = Path(__file__).parents[1]
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_ID = b'data: {"id":"cmpl-3f0b7c1d2a944f6c8e5d-90ab","object":"text_completion","created":1790000000,"model":"tiny"'
_EVENT = _ID + b',"choices":[{"index":0,"text":"K","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
_CHUNK = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
_WORDS = "the quick brown fox jumps over the lazy dog and runs away from it".split()
_ANSWER = json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": "K"}]}).encode()


# --- backends -------------------------------------------------------------------------------------------------------


async def steps(step_s: float) -> Iterator[None]:  # type: ignore[misc]
    """At whole multiples of the step on the monotonic clock, which all processes share."""
    while True:
        await asyncio.sleep(step_s - time.monotonic() % step_s)
        yield


ROLES = {"link": ("decode", "decode"), "pair": ("prefill", "decode")}  # of pd-serve's nodes


class OpenAI(asyncio.Protocol):
    """One connection: what the other routers' workers are asked."""

    streams: dict[OpenAI, int]  # tokens that are still to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._unread = b""

    def connection_lost(self, _: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, found, rest = self._unread.partition(b"\r\n\r\n")
        length = next((int(h[15:]) for h in head.split(b"\r\n") if h[:15].lower() == b"content-length:"), 0)
        if not found or len(rest) < length:
            return
        self._unread = b""
        if not head.startswith(b"POST"):
            self._json(b'{"object":"list","data":[{"id":"tiny","object":"model"}],"model_path":"tiny"}')
            return
        body = json.loads(rest)
        if not body.get("stream"):
            self._json(_ANSWER)
            return
        self._transport.write(_HEAD + _CHUNK)
        self.streams[self] = body["max_tokens"] - 1

    def _json(self, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )

    def step(self) -> None:
        self.streams[self] -= 1
        if self.streams[self] > 0:
            self._transport.write(_CHUNK)
        else:
            self._transport.write(_CHUNK + _END)
            del self.streams[self]


class Linked(ScriptedNode):
    """A node that makes the same token for all its sequences, a frame a step for each router. A prefill node hands each
    over after its first one, a decode node goes on with what it was handed."""

    def __init__(self, role: str, fabric: Fabric) -> None:
        super().__init__(fabric, role)
        self._open: dict[object, dict[str, list[int]]] = {}

    def load(self) -> link.Load:
        count = len(self.running)
        return link.Load(0, count, 0, [link.GroupUsage(100_000, 10 * count, 0, 100_000 - 10 * count)])

    async def _run(self, connection, submit: link.Submit) -> None:  # type: ignore[no-untyped-def]
        whole = submit.sampling.max_tokens
        finish = "length" if whole == 1 else None
        if submit.source is None:
            await self._send(connection, link.Outputs([link.Output(submit.id, 0, [FIRST], finish=finish)]))
        else:
            await self._send(connection, link.Outputs([link.Output(submit.id, 0, [], event="accepted")]))
            await self.fabric.arrival(submit.id)
            await self._send(connection, link.Outputs([link.Output(submit.id, 1, [], event="arrived")]))
        if submit.handoff:
            self.fabric.arrival(submit.id).set_result(None)
        elif finish is None:
            self._open.setdefault(connection, {})[submit.id] = [1, whole]
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._open[connection].pop(submit.id, None)

    async def step(self) -> None:
        for connection, sequences in self._open.items():
            items = []
            for id, sequence in list(sequences.items()):
                index, whole = sequence
                sequence[0] += 1
                ended = index + 1 == whole
                items.append(link.Output(id, index, [FIRST], finish="length" if ended else None))
                if ended:
                    self.running[id].cancel()
                    del sequences[id]
            if items:
                await self._send(connection, link.Outputs(items))


async def backends(kind: str, ports: list[int], step_s: float) -> None:
    """Two of them, in this process, until it is ended."""
    if kind in ROLES:
        fabric = Fabric()
        nodes = [await Linked(role, fabric).start(port) for role, port in zip(ROLES[kind], ports, strict=True)]
        async for _ in steps(step_s):
            for node in nodes:
                await node.step()
    loop = asyncio.get_running_loop()
    OpenAI.streams = {}
    for port in ports:
        await loop.create_server(OpenAI, "127.0.0.1", port, backlog=1024)
    async for _ in steps(step_s):
        for connection in list(OpenAI.streams):
            connection.step()


# --- the client -----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    requests: int = 0
    tokens: int = 0
    took_s: array[float] = field(default_factory=lambda: array("d"))  # of requests
    late_s: array[float] = field(default_factory=lambda: array("d"))  # of events after a stream's first
    broken: str = ""


class Client(asyncio.Protocol):
    """One connection, with one request after the other until the end of the run."""

    def __init__(self, seen: Seen, port: int, tokens: int, stream: bool, step_s: float, until_s: float) -> None:
        prompt = " ".join(random.choices(_WORDS, k=64))
        body = json.dumps(
            {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream,
             "ignore_eos": True}
        ).encode()  # fmt: skip
        self._ask = (
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (port, len(body), body)
        )
        self._seen, self._stream, self._step_s, self._until_s = seen, stream, step_s, until_s
        self._unread = b""
        self._begun = False
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        self._unread, self._begun, self._asked_s = b"", False, time.monotonic()
        self._transport.write(self._ask)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if not self._begun and not data.startswith(b"HTTP/1.1 200"):
            self._seen.broken = data[:300].decode(errors="replace")
            self._transport.close()
            return
        if self._stream:
            count = data.count(b'"text":"')
            self._seen.tokens += count
            if count and self._begun:
                self._seen.late_s.append(now_s % self._step_s)
            ended = data.endswith(b"0\r\n\r\n")
        else:
            self._unread += data
            head, _, body = self._unread.partition(b"\r\n\r\n")
            at = head.lower().find(b"content-length:")
            ended = at >= 0 and len(body) >= int(head[at + 15 :].split(b"\r\n", 1)[0])
        self._begun = True
        if ended:
            self._seen.requests += 1
            self._seen.took_s.append(now_s - self._asked_s)
            if now_s < self._until_s:
                self._next()
            else:
                self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def load(port: int, connections: int, tokens: int, stream: bool, step_s: float, seconds: float) -> Seen:
    seen = Seen()
    until_s = time.monotonic() + seconds
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: Client(seen, port, tokens, stream, step_s, until_s), "127.0.0.1", port
        )
        clients.append(client)
    async with asyncio.timeout(seconds + tokens * step_s + 60):
        await asyncio.gather(*(client.ended for client in clients))
    if seen.broken:
        raise SystemExit(f"port {port} answered: {seen.broken}")
    return seen


# --- systems --------------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(listen("127.0.0.1", 0)).getsockname()[1] for _ in range(count)]


def cpu_s(pid: int) -> float:
    """User and system time of a process and its living children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    clock = ~pid << 3 | 2  # of all its threads, in ns: clock_getcpuclockid(3)
    return time.clock_gettime(clock) + sum(map(cpu_s, map(int, children)))


class System:
    """A router in front of its backends; "direct" has none."""

    def __init__(self, name: str, program: str, step_s: float, options: list[str]) -> None:
        self.name = name
        self.label, _, directory = name.partition("@")
        ports = free_ports(3 if program else 2)
        kind = "openai" if not name.startswith("pd-serve") else "pair" if "pair" in self.label else "link"
        # A request for one token has nothing to decode.
        self.tokens = 2 if kind == "pair" else 1
        python = ["env", f"PYTHONPATH={directory}", sys.executable] if directory else [sys.executable]
        file = str(Path(directory or _HERE, "benchmarks", Path(__file__).name))
        own = [*python, file, "--backends", kind, "--step", str(step_s), "--ports", *map(str, ports[-2:])]
        self._children = [Child(own)]
        self.port = ports[0]
        urls = [f"http://127.0.0.1:{port}" for port in ports[-2:]]
        if not program:
            return
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        if kind in ROLES:
            command = [*shlex.split(program), "router", *where, "--min-prefill", str(ROLES[kind].count("prefill"))]
            for role in dict.fromkeys(ROLES[kind]):
                listed = [url for url, own in zip(urls, ROLES[kind], strict=True) if own == role]
                command += [f"--{role}", ",".join(listed)]
            command += ["--log-level", "warning", *options]
        else:
            command = [*shlex.split(program), *where, "--policy", "round_robin", "--worker-urls", *urls]
            command += ["--prometheus-port", str(free_ports(1)[0]), "--log-level", "error"]
        # Captured: they log to standard output whatever they are told, little enough to stay in the pipe.
        self._children.append(Child(command, capture=kind not in ROLES))

    @property
    def cpu_s(self) -> float:
        return cpu_s(self._children[-1].pid)

    def wait(self) -> None:
        deadline_s = time.monotonic() + 60
        path = "/ready" if self.name.startswith("pd-serve") else "/health"
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                if answer.status == 200:
                    return
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self.name} is not ready")
            time.sleep(0.2)

    def close(self) -> None:
        for child in reversed(self._children):
            child.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired, ChildProcessError):
                os.waitpid(child.pid, 0)


def p99(values: array[float]) -> float:
    return 1e3 * sorted(values)[int(len(values) * 0.99)] if values else float("nan")


def measure(system: System, connections: int, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens and requests for a CPU second."""
    step_s, results = options.step, []
    tokens = max(2, round(options.seconds / step_s))
    for stream in (True, False):
        before_s, started_s = system.cpu_s, time.monotonic()
        work = load(
            system.port,
            connections,
            tokens if stream else system.tokens,
            stream,
            step_s,
            0 if stream else options.seconds,
        )
        seen = uvloop.run(work)
        took_s, used_s = time.monotonic() - started_s, system.cpu_s - before_s
        count = seen.tokens if stream else seen.requests
        times = seen.late_s if stream else seen.took_s
        results.append(count / used_s)
        print(
            f"{system.label:12} {connections:4} {'tokens' if stream else 'requests':8} {count / used_s:9.0f} a CPU s"
            f" {1e6 * used_s / count:7.1f} us each {count / took_s:8.0f} a second,"
            f" {'late' if stream else 'took'} p50 {1e3 * statistics.median(times):6.2f} p99 {p99(times):6.2f} ms",
            flush=True,
        )
    return results[0], results[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "others", nargs="*", metavar="NAME=PROGRAM", help="NAME pd-serve...: another pd-serve command, or @DIRECTORY"
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--step", type=float, default=0.05, help="seconds between two tokens of a stream")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--router-option", action="append", default=[], help="of pd-serve router, such as --workers=2")
    parser.add_argument("--backends", help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backends:
        uvloop.run(backends(options.backends, options.ports, options.step))
    programs = {"direct": "", "pd-serve": f"{sys.executable} -m pd_serve.cli"}
    for other in options.others:
        name, equals, program = other.partition("=")
        directory = name.partition("@")[2]
        programs[name] = program if equals else f"env PYTHONPATH={directory} {sys.executable} -P -m pd_serve.cli"
    systems: list[System] = []
    try:
        for name, program in programs.items():
            systems.append(System(name, program, options.step, options.router_option))
        for system in systems:
            system.wait() if system.name != "direct" else time.sleep(2)
        for connections in options.connections:
            found: dict[str, list[tuple[float, float]]] = {system.name: [] for system in systems}
            for _ in range(options.repeats):
                for system in systems:
                    found[system.name].append(measure(system, connections, options))
            for name in list(found)[2:]:
                pairs = list(zip(found["pd-serve"], found[name], strict=True))
                ratios = [sorted(ours[n] / theirs[n] for ours, theirs in pairs) for n in (0, 1)]
                tokens, requests = (f"{statistics.median(r):.3f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios)
                print(f"{connections} connections: pd-serve / {name}: {tokens} tokens, {requests} requests")
    finally:
        for system in systems:
            system.close()


if __name__ == "__main__":
    main()
