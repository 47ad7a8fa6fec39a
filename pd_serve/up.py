"""``pd-serve up``: a router and its nodes on this machine, started, watched and ended together.

Called by the command line. Each process runs the command that a user would run by hand, from a file with
its settings, the nodes' secret among them; nodes find the router by registering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_serve import config as settings
from pd_serve import introduction, logs, preflight
from pd_serve.config import NodeConfig, RouterConfig, UpConfig
from pd_serve.memory.choice import choose
from pd_serve.memory.visible import VARIABLE, count_gpus, deal_gpus
from pd_serve.models.sizes import sizes
from pd_serve.models.source import resolve
from pd_serve.net import listen, netloc
from pd_serve.settings import values_of
from pd_serve.supervised import Supervised
from pd_serve.trust import server_tls

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

# Ctrl-C ends everything within 5 s. The router ends first: it tells open streams why while the nodes still serve them.
_ROUTER_DRAIN_S, _ROUTER_KILL_S = 1.5, 2.8
_NODE_DRAIN_S, _NODE_KILL_S = 1.0, 1.8
_POLL_S = 0.1
_PATIENCE_S = 20.0  # a start that takes longer is explained by what the processes print
_LOCAL = "127.0.0.1"


def run(config: UpConfig) -> int:
    """Serves until Ctrl-C or SIGTERM; the exit status. Raises PDServeError when something does not start."""
    logs.configure(config.log_level, "up", form=config.log_format)
    started_s = time.monotonic()
    chosen = choose(config.device)
    config = _on_device(config, chosen.device)
    preflight.check(config, nodes=sum(config.counts().values()))
    config.api_keys()
    server_tls(config.ssl_certfile, config.ssl_keyfile)
    template = config.chat_template_text()
    model = resolve(config.model, config.dtype, config.load_format, device=config.device)
    config = replace(
        config,
        model=str(model.directory),
        dtype=model.dtype,
        load_format=model.load_format,
        served_model_name=config.served_model_name or model.name,
    )
    chosen.log()
    sizes(config, model.directory, template)  # what cannot be is said before anything starts
    with tempfile.TemporaryDirectory(prefix="pd-serve-up-") as directory:
        processes = _plan(config, Path(directory))
        return asyncio.run(Up(config, processes, started_s).run())


def _on_device(config: UpConfig, device: str) -> UpConfig:
    """GPUs for a single node get one that does both, unless the nodes were counted."""
    config = replace(config, device=device)
    counted = config.prefill is not None or config.decode is not None or config.both or config.kv_cache_memory
    if config.device == "cuda" and not counted and count_gpus() // config.tp == 1:
        log.info("there are GPUs for one node: it computes prompts and decodes (as with --both 1)")
        config = replace(config, both=1)
    return config


def _plan(config: UpConfig, directory: Path) -> list[Supervised]:
    """All processes, the router first. Raises ConfigError when the port is taken, or GPUs are too few."""
    listen(config.host, config.port).close()
    if (admin := config.admin_address()) is not None:
        listen(*admin, "--admin-host or --admin-port").close()
    url = _router_url(config)
    counts = config.counts()
    roles = [(role, index) for role, number in counts.items() for index in range(number)]
    count = len(roles)
    gpus = deal_gpus(count, config.tp, may_share=config.kv_cache_memory > 0) if config.device == "cuda" else []
    cores = config.cpus or tuple(sorted(os.sched_getaffinity(0)))
    ports = _free_ports(count)
    urls = tuple(f"http://{netloc(_LOCAL, port)}" for port in ports)
    listed = bool(config.ssl_certfile)  # else they register; this way they need not verify the router beside them
    # The nodes' own secret: nobody else on this machine can register a node, use one or read its KV.
    secret = {"secret": config.node_secret() or secrets.token_urlsafe(32), "secret_file": ""}
    routers = RouterConfig(
        **values_of(config, settings.RouterSettings)
        | secret
        | {"drain_timeout_s": min(config.drain_timeout_s, _ROUTER_DRAIN_S)},
        prefill=urls[: counts["prefill"]] if listed else (),
        decode=urls[counts["prefill"] :] if listed else (),
        min_prefill=min(1, counts["prefill"] + counts["both"]),
        min_decode=1,
    )
    plan = [Supervised("router", "router", url, _write(directory, "router", "router", routers))]
    shared = values_of(config, settings.EngineSettings) | secret
    shared |= {"ssl_certfile": "", "ssl_keyfile": "", "ssl_ca": ""}  # nodes are on this machine alone
    for number, (role, index) in enumerate(roles):
        share = _share(cores, number, count)
        node = NodeConfig(
            **shared
            | {
                "role": role,
                "host": _LOCAL,  # nodes are the router's business alone
                "port": ports[number],
                "router": () if listed else (url,),
                "threads": config.threads or len(share),
                "cpus": share if config.cpus else (),
                "drain_timeout_s": _NODE_DRAIN_S,
            }
        )
        name = f"{role}-{index}"
        command = "node" if role == "both" else role
        path = _write(directory, name, command, node)
        environ = {VARIABLE: gpus[number]} if gpus else {}
        plan.append(Supervised(name, command, f"http://{node.host}:{node.port}", path, environ))
    return plan


def _share(cores: tuple[int, ...], number: int, count: int) -> tuple[int, ...]:
    """The cores of engine ``number`` of ``count``: a slice, or one core that it shares when there are too few."""
    if len(cores) < count:
        return (cores[number % len(cores)],)
    return cores[number * len(cores) // count : (number + 1) * len(cores) // count]


def _write(directory: Path, name: str, command: str, config: settings.Common) -> Path:
    path = directory / f"{name}.json"
    path.touch(mode=0o600)  # it holds the secret, and may hold API keys
    path.write_text(settings.to_json(command, config), encoding="utf-8")
    return path


def _router_url(config: UpConfig) -> str:
    """Where processes and users of this machine reach the router."""
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{netloc(_LOCAL if config.host in ('0.0.0.0', '::') else config.host, config.port)}"


def _free_ports(count: int) -> list[int]:
    """Different ones: all are held until the last is found."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(listen(_LOCAL, 0)).getsockname()[1] for _ in range(count)]


class Up:
    """All processes, from start to end. The first is the router."""

    def __init__(self, config: UpConfig, processes: list[Supervised], started_s: float) -> None:
        self._config = config
        self._processes = processes
        self._started_s = started_s
        self._stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        print(f"Starting {_count(self._config)} for {self._config.served_model_name} ...", flush=True)
        for process in self._processes:
            process.start(verbose=self._config.log_level == "debug")
        stop = asyncio.create_task(self._stop.wait())
        introduction = asyncio.create_task(self._introduce())
        watching = [asyncio.create_task(process.keep_running()) for process in self._processes]
        pending: set[asyncio.Task[Any]] = {stop, introduction, *watching}
        try:
            while not stop.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises when something does not start, or dies too often
            print("Ending ...", flush=True)
        finally:
            for task in (stop, introduction, *watching):
                task.cancel()
            await asyncio.gather(stop, introduction, *watching, return_exceptions=True)
            router, *nodes = self._processes
            await router.stop(_ROUTER_KILL_S)
            await asyncio.gather(*(process.stop(_NODE_KILL_S) for process in nodes))
        return 0

    def _signalled(self) -> None:
        if self._stop.is_set():
            for process in self._processes:
                process.kill()
        self._stop.set()

    async def _introduce(self) -> None:
        """Waits until all serve, then prints what there is and what to type."""
        import httpx  # while the processes start: it takes 0.1 s

        # Not verified: nothing is told to them, and they are ours.
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            await self._wait_ready(client)
            while (rows := await self._rows(client)) is None:  # one died just now: it is started again
                await self._wait_ready(client)
            pages = await self._pages(client)
        url, took_s = _router_url(self._config), time.monotonic() - self._started_s
        chat = await asyncio.to_thread(_chats, self._config.model)  # reads files; the loop watches processes
        print(introduction.text(self._config, url, pages, rows, took_s, chat=chat), flush=True)
        for process in self._processes:
            process.stream()

    async def _wait_ready(self, client: httpx.AsyncClient) -> None:
        """Until every node is linked and the router is ready."""
        waiting = list(self._processes)
        while waiting:
            if time.monotonic() - self._started_s > _PATIENCE_S:
                for process in self._processes:
                    process.stream(everything=True)
            for process in list(waiting):
                if await _is_ready(client, process):
                    process.has_served = True
                    waiting.remove(process)
            await asyncio.sleep(_POLL_S if waiting else 0)

    def _admin_url(self) -> str:
        """Of the router's own port for operators; empty where they use the one that clients do."""
        address = self._config.admin_address()
        scheme = "https" if self._config.ssl_certfile else "http"
        return "" if address is None else f"{scheme}://{netloc(*address)}"

    async def _pages(self, client: httpx.AsyncClient) -> dict[str, str]:
        """Those of the router that are there, some for who has a key."""
        url = _router_url(self._config)
        known = {
            "The API, to read and to try": f"{url}/docs",
            "What happens here, live": f"{self._admin_url() or url}/dashboard",
        }
        return {what: page for what, page in known.items() if (await client.get(page)).status_code != 404}

    async def _rows(self, client: httpx.AsyncClient) -> list[tuple[str, ...]] | None:
        """None where a process does not answer."""
        router, *nodes = self._processes
        rows: list[tuple[str, ...]] = [("process", "endpoint", "model", "dtype", "transport", "pid", "engine")]
        rows.append((router.name, router.url, "", "", "", str(router.pid), ""))
        if admin := self._admin_url():
            rows.append(("admin", admin, "", "", "", str(router.pid), ""))
        for process in nodes:
            status = await _document(client, f"{process.url}/v1/status")
            if not status.get("links"):
                return None
            engine = status["engine"]
            served = (engine["model"]["name"], status["dtype"], engine["transport"])
            rows.append((process.name, process.url, *served, str(process.pid), str(engine["pid"])))
        return rows


def _count(config: UpConfig) -> str:
    found = [
        f"{count} {'' if role == 'both' else f'{role} '}node{'s' * (count > 1)}"
        for role, count in config.counts().items()
        if count
    ]
    return " + ".join(["router", *found])


def _chats(model: str) -> bool:
    from pd_serve.wire.model import bundle_from_directory

    return bool(bundle_from_directory(model).chat_templates)


async def _is_ready(client: httpx.AsyncClient, process: Supervised) -> bool:
    """A router: when it says so. A node: when it is linked to the router."""
    path, says_so = ("/ready", "ready") if process.role == "router" else ("/v1/status", "links")
    return bool((await _document(client, f"{process.url}{path}")).get(says_so))


async def _document(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """Empty where nobody answers."""
    import httpx

    try:
        found: dict[str, Any] = (await client.get(url)).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return found
