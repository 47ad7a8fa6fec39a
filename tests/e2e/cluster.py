"""Real processes for tests: a router and nodes, started through the command line, ended by pid."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.nursery import Started, start
from tests.ports import free_port

START_TIMEOUT_S = 90.0

# one client for all polls: making one costs more CPU than a hundred requests
HTTP = httpx.Client(timeout=120)


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Waits until ``condition()`` is true and returns it; fails with what was last seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


class Server:
    """One ``pd-serve`` process (router or node) and what it started."""

    def __init__(
        self, command: str, flags: dict[str, object], log: Path, environ: dict[str, str] | None = None
    ) -> None:
        self.command = command
        self.port = int(str(flags["port"]))
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        args = [command]
        for name, value in flags.items():
            if isinstance(value, bool):
                args.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            else:
                args += [f"--{name.replace('_', '-')}", str(value)]
        self.process: Started | subprocess.Popen[bytes]
        if environ is None and flags.get("device") != "cuda":
            self.process = start("pd_serve.cli", args, log)
        else:  # variables may be for the interpreter; a driver of GPUs works in no fork
            with log.open("ab") as out:
                args = [sys.executable, "-m", "pd_serve.cli", *args]
                self.process = subprocess.Popen(
                    args, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ, **(environ or {})}
                )

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> Any:
        return HTTP.get(self.url + path, timeout=10).json()

    def ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(
                f"{self.command} ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
            )
        with contextlib.suppress(httpx.HTTPError):
            return HTTP.get(self.url + "/ready", timeout=5).status_code == 200
        return False

    def wait_ready(self) -> None:
        try:
            wait_for(self.ready, START_TIMEOUT_S, f"{self.command} ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-4000:]}") from None

    def family(self) -> list[int]:
        return [self.pid, *children(self.pid)]

    def signal_all(self, number: int) -> None:
        """To the process and everything it started, children first."""
        for pid in reversed(self.family()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """As a crash would: SIGKILL to all at once."""
        self.signal_all(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(
                    f"{self.command} did not end after SIGTERM:\n{self.log.read_text()[-4000:]}"
                ) from None
        return int(self.process.returncode)

    def load(self) -> dict[str, Any]:
        return dict(self.get("/v1/status")["load"])

    def blocks_used(self) -> int:
        return sum(group["used"] for group in self.load()["groups"])


class Cluster:
    """A router with nodes that register themselves. Flags given are for all nodes; ``only``: further ones of a role."""

    def __init__(
        self,
        directory: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        both: int = 0,
        router: dict[str, object] | None = None,
        only: dict[str, dict[str, object]] | None = None,
        **flags: object,
    ) -> None:
        self.directory = directory
        self.flags = {
            "device": "cpu",
            "threads": 1,
            "drain_timeout_s": 5,
            "dtype": "float32",
            "kv_cache_memory": "64MiB",
            **flags,
        }
        self.only = only or {}
        self.router = self.start_router(free_port(), router or {}, prefill + both, decode + both)
        self.prefills = [self.start_node("prefill") for _ in range(prefill)]
        self.decodes = [self.start_node("decode") for _ in range(decode)]
        self.boths = [self.start_node("node") for _ in range(both)]

    def start_router(self, port: int, flags: dict[str, object], prefill: int, decode: int) -> Server:
        flags = {"port": port, "min_prefill": prefill, "min_decode": decode, **flags}
        return Server("router", flags, self.directory / f"router-{port}.log")

    def start_node(self, role: str, *, environ: dict[str, str] | None = None, **flags: object) -> Server:
        port = free_port()
        flags = {"port": port, "router": self.router.url, **self.flags, **self.only.get(role, {}), **flags}
        return Server(role, flags, self.directory / f"{role}-{port}.log", environ)

    @contextlib.contextmanager
    def another_router(self, prefills: list[Server], decodes: list[Server], **flags: object) -> Iterator[Cluster]:
        """The same nodes, or some of them, behind a second router."""
        front = copy.copy(self)
        front.prefills, front.decodes, front.boths = list(prefills), list(decodes), []
        for role, nodes in (("prefill", prefills), ("decode", decodes)):
            if nodes:
                flags[role] = ",".join(node.url for node in nodes)
        front.router = self.start_router(free_port(), flags, len(prefills), len(decodes))
        try:
            yield front.wait_ready()
        finally:
            front.router.stop()

    def revive(self) -> None:
        """Starts dead nodes again and waits until the router has all of them."""
        for role, nodes in (("prefill", self.prefills), ("decode", self.decodes), ("node", self.boths)):
            nodes[:] = [n if n.process.poll() is None else self.start_node(role) for n in nodes]
        want = sorted(node.url for node in self.nodes)

        def linked() -> list[str]:
            return sorted(n["url"] for n in self.router.get("/v1/status")["nodes"] if n["state"] == "ready")

        wait_for(lambda: linked() == want, START_TIMEOUT_S, "all nodes linked")

    @property
    def nodes(self) -> list[Server]:
        return [*self.prefills, *self.decodes, *self.boths]

    @property
    def url(self) -> str:
        return self.router.url

    def wait_ready(self) -> Cluster:
        self.router.wait_ready()
        return self

    def complete(self, prompt: object, max_tokens: int = 16, **body: object) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body}
        answer = HTTP.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @property
    def model(self) -> str:
        return str(self.router.get("/v1/models")["data"][0]["id"])

    def assert_idle(self, timeout_s: float = 10.0) -> None:
        """No lease, no pull, no block held on any living node, and the books balance."""
        for node in self.nodes:
            if node.process.poll() is None:
                wait_for(
                    lambda node=node: (
                        (load := node.load())["leases"] == load["pulling"] == load["running"] == 0
                        and node.blocks_used() == 0
                    ),
                    timeout_s,
                    f"{node.command} idle: {node.load()}",
                )
                assert node.get("/v1/status")["counters"]["leaks"] == 0

    def stop(self) -> None:
        for server in [*self.nodes, self.router]:
            if server.process.poll() is None:
                server.signal_all(signal.SIGCONT)
                server.process.terminate()
        for server in [*self.nodes, self.router]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(15)
            if server.process.poll() is None:
                server.kill()


@contextlib.contextmanager
def cluster(directory: Path, **arguments: Any) -> Iterator[Cluster]:
    """A cluster that is ready, and gone afterwards; its logs are shown when the test fails inside."""
    running = Cluster(directory, **arguments)
    try:
        yield running.wait_ready()
    except BaseException:
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-3000:]}")
        raise
    finally:
        running.stop()
