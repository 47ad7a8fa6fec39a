"""Two prefill and two decode nodes under load while nodes are killed, paused and restarted at random, with a stranger
and a misfit among them: what became of every request, and what is left behind.

The quick form is a test (test_chaos.py); ``python benchmarks/chaos.py`` runs the long one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.cluster import START_TIMEOUT_S, Cluster, Server, wait_for

CASES = 48
CLIENTS = 12
TIMEOUT_S = 90.0  # a request that takes longer hangs
GIVE_UP_S = 60.0  # a client that is refused asks again for so long
FAULTS = ("kill", "kill engine", "pause", "pause engine", "restart")
PAUSE_S = (0.3, 7.0)  # shorter and longer than every time-out that may fire
BETWEEN_S = (0.2, 1.2)


@dataclass
class Report:
    """``lost``: ended in anything but a whole answer. ``refused``: asked again after a 429 or 503 with Retry-After."""

    requests: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    seconds: float = 0.0
    sent_to_stranger: int = 0  # requests of the router, or of nodes, that reached an address the stranger named
    obeyed: int = 0  # orders of the stranger that were carried out
    sent_to_misfit: float = 0.0  # requests that a node with another secret was given
    leaks: float = 0.0

    def failures(self) -> dict[str, object]:
        """What must be empty or 0."""
        bad: dict[str, object] = {"lost": self.lost, "wrong": self.wrong, "hung": self.hung, "leaks": self.leaks}
        bad |= {"sent to the stranger": self.sent_to_stranger, "orders of the stranger obeyed": self.obeyed}
        bad |= {"sent to the misfit": self.sent_to_misfit}
        return {name: value for name, value in bad.items() if value}

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.tokens} tokens in {self.seconds:.0f} s; faults: "
            + ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
            + f"; lost {len(self.lost)}, wrong {len(self.wrong)}, hung {len(self.hung)}, leaked {self.leaks:g}, "
            f"to the stranger {self.sent_to_stranger}, to the misfit {self.sent_to_misfit:g}; refused and asked again: "
            f"{dict(self.refused)}; longest {self.longest_s:.1f} s"
        )


def cases(vocab: int = 390) -> list[dict[str, Any]]:
    """Bodies of completions: greedy and seeded, one choice and two, whole and streamed, short and long."""
    chance = random.Random(1)
    found = []
    for number in range(CASES):
        length = chance.choice([3, 15, 16, 17, 40, 120, 300])
        body: dict[str, Any] = {
            "prompt": [chance.randrange(5, vocab) for _ in range(length)],
            "max_tokens": chance.choice([1, 2, 12, 30, 60]),
            "ignore_eos": True,
            "return_token_ids": True,
            "temperature": 0,
        }
        if number % 3 == 1:
            body |= {"temperature": 0.8, "seed": number, "top_p": 0.95}
        if number % 8 == 5:
            body |= {"n": 2, "temperature": 0.8, "seed": number}
        found.append(body)
    return found


class Stranger:
    """Knows no secret: listens on an address that it names everywhere, and asks for what it must not have."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.called = 0
        self.obeyed = 0  # orders of it that were carried out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.called += 1
            connection.close()

    async def pester(self, http: httpx.AsyncClient, system: Cluster, chance: random.Random) -> None:
        """One of the things that a stranger tries, on one of the ports."""
        node = chance.choice(system.nodes)
        try:
            match chance.randrange(5):
                case 0:
                    answer = await http.post(system.url + "/nodes", json={"url": self.url})
                    self.obeyed += answer.is_success
                case 1:
                    url = chance.choice(system.nodes).url
                    answer = await http.request("DELETE", system.url + "/nodes", json={"url": url})
                    self.obeyed += answer.is_success
                case 2:
                    await self._garbage(node.port, chance)
                case 3:
                    await self._garbage(system.router.port, chance)
                case _:
                    for address in node.get("/v1/status")["engine"].get("peer_addresses", ()):
                        await self._garbage(int(address.rpartition(":")[2]), chance)
        except (httpx.HTTPError, OSError, KeyError, ValueError):
            pass  # the node is dead at the moment

    async def _garbage(self, port: int, chance: random.Random) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(chance.randbytes(chance.randrange(1, 4000)))
        await asyncio.sleep(0.05)
        writer.close()

    def close(self) -> None:
        self._stop.set()
        self._listener.close()
        self._thread.join(5)


class Chaos:
    def __init__(self, directory: Path, model: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        secret = directory / "secret"
        secret.write_text("of-the-nodes-" + "x" * 32)
        secret.chmod(0o600)
        other = directory / "another-secret"
        other.write_text("of-a-misfit--" + "y" * 32)
        other.chmod(0o600)
        self.system = Cluster(
            directory,
            prefill=2,
            decode=2,
            router={"secret_file": secret, "node_wait_s": 20, "max_attempts": 20},
            model=model,
            dtype="float32",
            kv_cache_memory="16MiB",
            lease_s=6,
            secret_file=secret,
        )
        self._misfit = {"secret_file": other}
        self.report = Report()
        self.misfit: Server | None = None
        self.stranger = Stranger()
        self._under_fault: set[int] = set()  # pids of nodes

    # --- requests -------------------------------------------------------------------------------------

    async def answer(self, http: httpx.AsyncClient, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of each choice. Raises what went wrong, as ValueError with a sentence."""
        if body.get("stream"):
            return await self._streamed(http, body)
        answer = await http.post(self.system.url + "/v1/completions", json=body)
        if answer.status_code != 200:
            raise _Refused(answer)
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return [choice["token_ids"] for choice in choices]

    async def _streamed(self, http: httpx.AsyncClient, body: dict[str, Any]) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in range(body.get("n", 1))]
        done = False
        async with http.stream("POST", self.system.url + "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise _Refused(answer)
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"an error in the stream: {event['error']['message']}")
                for choice in event["choices"]:
                    tokens[choice["index"]] += choice.get("token_ids") or []
        if not done:
            raise ValueError("the stream ended without [DONE]")
        return tokens

    async def _client(
        self,
        http: httpx.AsyncClient,
        leaving: httpx.AsyncClient,
        load: Iterator[tuple[int, dict[str, Any]]],
        expected: list[Any],
        rest_s: float,
    ) -> None:
        for number, body in load:
            await asyncio.sleep(rest_s)
            started_s = time.monotonic()
            self.report.requests += 1
            while True:
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        found = await self.answer(http, body)
                except _Refused as refused:
                    if refused.again and time.monotonic() - started_s < GIVE_UP_S:
                        self.report.refused[refused.status] += 1
                        await asyncio.sleep(min(refused.after_s, 2.0))
                        continue
                    self.report.lost.append(f"case {number}: {refused}")
                except TimeoutError:
                    self.report.hung.append(f"case {number}: nothing after {TIMEOUT_S:g} s: {body.get('stream')}")
                except (httpx.HTTPError, ValueError) as error:
                    self.report.lost.append(f"case {number}: {error!r}")
                else:
                    self.report.tokens += sum(map(len, found))
                    if found != expected[number]:
                        self.report.wrong.append(f"case {number}: {found} instead of {expected[number]}")
                self.report.longest_s = max(self.report.longest_s, time.monotonic() - started_s)
                break
            if self._chance.random() < 0.05:
                await self._leave_early(leaving, dict(body))

    async def _leave_early(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._chance.uniform(0.0, 0.1)):
                await self.answer(http, body)
        except (TimeoutError, httpx.HTTPError, ValueError):
            pass

    # --- faults ---------------------------------------------------------------------------------------

    async def _torment(self, done: asyncio.Event, http: httpx.AsyncClient) -> None:
        """One fault after the other; at least one node of each role is left alone."""
        tasks: set[asyncio.Task[None]] = set()
        while not done.is_set():
            await asyncio.sleep(self._chance.uniform(*BETWEEN_S))
            await self.stranger.pester(http, self.system, self._chance)
            nodes = self._chance.choice([self.system.prefills, self.system.decodes])
            if any(node.pid in self._under_fault for node in nodes):
                continue
            place = self._chance.randrange(len(nodes))
            kind = self._chance.choice(FAULTS)
            self.report.faults[kind] += 1
            task = asyncio.create_task(self._fault(kind, nodes, place))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _fault(self, kind: str, nodes: list[Server], place: int) -> None:
        node = nodes[place]
        self._under_fault.add(node.pid)
        try:
            match kind:
                case "kill":
                    node.kill()
                case "kill engine":
                    for pid in node.family()[1:]:
                        _signal(pid, signal.SIGKILL)
                case "restart":
                    node.process.terminate()
                case _:
                    family = node.family()[1:] if kind == "pause engine" else node.family()
                    for pid in reversed(family):
                        _signal(pid, signal.SIGSTOP)
                    await asyncio.sleep(self._chance.uniform(*PAUSE_S))
                    for pid in family:
                        _signal(pid, signal.SIGCONT)
                    if node.process.poll() is None:
                        await self._linked(node)
                        return
            await asyncio.to_thread(node.process.wait, 60)
            nodes[place] = self.system.start_node(node.command)  # as a supervisor does
            self._under_fault.add(nodes[place].pid)
            await self._linked(nodes[place])
        finally:
            self._under_fault -= {node.pid, nodes[place].pid}

    async def _linked(self, node: Server) -> None:
        """Waits until the router has the node (again)."""

        def ready() -> bool:
            known = self.system.router.get("/v1/status")["nodes"]
            return any(entry["url"] == node.url and entry["state"] == "ready" for entry in known)

        await asyncio.to_thread(wait_for, ready, START_TIMEOUT_S, f"{node.command} node {node.url} is linked")

    # --- all of it ------------------------------------------------------------------------------------

    def _load(self, requests: int, faults: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers of cases and their bodies: at least so many, and until there were so many faults."""
        number = 0
        while number < requests or sum(self.report.faults.values()) < faults:
            order = list(enumerate(cases()))
            self._chance.shuffle(order)
            for case, body in order:
                yield case, {**body, "stream": self._chance.random() < 0.5}
            number += len(order)

    async def _run(self, load: Iterator[tuple[int, dict[str, Any]]], clients: int, rest_s: float) -> Report:
        limits = httpx.Limits(max_connections=None)
        make = partial(httpx.AsyncClient, timeout=TIMEOUT_S, limits=limits, trust_env=False)
        # those who leave share no connections with the others: what these see is then the router's doing
        async with make() as http, make() as leaving:
            bodies = cases()
            expected = [await self.answer(http, body) for body in bodies]
            self.misfit = self.system.start_node("decode", **self._misfit)
            started_s = time.monotonic()
            done = asyncio.Event()
            torment = asyncio.create_task(self._torment(done, http))
            await asyncio.gather(*(self._client(http, leaving, load, expected, rest_s) for _ in range(clients)))
            self.report.seconds = time.monotonic() - started_s
            done.set()
            await torment
        return self.report

    def run(self, requests: int, faults: int = 0, clients: int = CLIENTS, rest_s: float = 0.0) -> Report:
        """At least so many of both. ``rest_s``: a client's, between two requests.

        Raises AssertionError when a node does not come back, or a block, lease or pull is left.
        """
        self.system.wait_ready()
        report = asyncio.run(self._run(self._load(requests, faults), clients, rest_s))
        self.system.assert_idle(30)
        for node in self.system.nodes:
            report.leaks += node.get("/v1/status")["counters"]["leaks"]
        assert self.misfit is not None
        report.sent_to_misfit = self.misfit.get("/v1/status")["counters"].get("requests", 0.0)
        report.sent_to_stranger, report.obeyed = self.stranger.called, self.stranger.obeyed
        return report

    def close(self) -> None:
        self.stranger.close()
        if self.misfit is not None and self.misfit.process.poll() is None:
            self.misfit.stop()
        self.system.stop()


class _Refused(ValueError):
    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(f"HTTP {answer.status_code}: {answer.text[:300]}")
        self.status = answer.status_code
        after = answer.headers.get("retry-after")
        self.again = self.status in (429, 503) and after is not None
        self.after_s = float(after or 1)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
