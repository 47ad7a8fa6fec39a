"""What the router processes on one port tell each other: questions and answers over Unix sockets, one a process.

Each is a router of its own to the nodes; with this they answer operators and nodes as one. Whoever can open the
sockets can give orders about nodes: their directory is the parent's (see :mod:`pd_serve.router.workers`), for its user
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

_TIMEOUT_S = 1.0  # of one that is busy with requests; one that died refuses at once
_MAX_BYTES = 64 << 20
# Families that say what nodes say, the same in each process.
_OF_NODES = (
    "pd_serve_nodes",
    "pd_serve_router_node_",
    "pd_serve_unfit_pair",
    "vllm:num_requests_",
    "vllm:kv_cache_usage",
    "vllm:gpu_cache_usage",
)

Question = dict[str, Any]
Answer = Callable[[Question], Any]


class Siblings:
    """``index``: which of ``count`` this process is. ``key``: what all of them make nonces with."""

    def __init__(self, directory: Path, index: int, count: int, key: bytes) -> None:
        self.index = index
        self.key = key
        self._paths = {number: directory / f"{number}.socket" for number in range(count)}
        self._server: asyncio.Server | None = None

    async def start(self, answer: Answer) -> None:
        """``answer``: to a question, what JSON can say."""
        path = self._paths[self.index]
        path.unlink(missing_ok=True)  # of the process whose place this one takes

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                question = msgspec.json.decode(await reader.readline(), type=dict[str, Any])
                writer.write(msgspec.json.encode(answer(question)))
                await writer.drain()
            except (OSError, ValueError):
                log.exception("a sibling's question could not be answered")
            finally:
                writer.close()

        self._server = await asyncio.start_unix_server(serve, path, limit=_MAX_BYTES)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._paths[self.index].unlink(missing_ok=True)

    async def ask(self, question: Question) -> dict[int, Any]:
        """Their answers by number; None of those that do not answer."""
        others = [number for number in self._paths if number != self.index]
        return dict(zip(others, await asyncio.gather(*(self._ask(n, question) for n in others)), strict=True))

    async def _ask(self, number: int, question: Question) -> Any:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._paths[number])
                with contextlib.closing(writer):
                    writer.write(msgspec.json.encode(question) + b"\n")
                    return msgspec.json.decode(await reader.read())
        except (OSError, ValueError):  # TimeoutError is one
            return None


async def gathered(siblings: Siblings | None, what: str, mine: Any) -> dict[int, Any]:
    """This process's own answer (number 0 where it is alone) and the others'."""
    if siblings is None:
        return {0: mine}
    return dict(sorted({siblings.index: mine, **await siblings.ask({"what": what})}.items()))


def joined_metrics(texts: dict[int, str | None], mine: int) -> bytes:
    """Prometheus' text of all processes: what is of requests with the process's number as ``worker``, what is of nodes
    (each process sees the same) as ``mine`` says it."""
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Metric] = {}
    for worker, text in texts.items():
        for family in text_string_to_metric_families(text or ""):
            own = _is_of_process(family)
            if not own and worker != mine:
                continue
            found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            label = {"worker": str(worker)} if own else {}
            found.samples += [sample._replace(labels={**label, **sample.labels}) for sample in family.samples]

    class Joined:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Joined())
    return generate_latest(registry)


def joined_status(mine: dict[str, Any], found: dict[int, dict[str, Any] | None]) -> dict[str, Any]:
    """``mine`` with the sums of all, and a line for each. Nodes' places are as this process sees them."""
    living = {worker: status for worker, status in found.items() if status is not None}
    in_flight: Counter[str] = Counter()
    of_nodes: Counter[str] = Counter()
    for status in living.values():
        in_flight.update(status["in_flight"])
        of_nodes.update({node["id"]: node["in_flight"] for node in status["nodes"] if "id" in node})
    brief = ("pid", "uptime_s", "draining", "sequences")
    return {
        **mine,
        "in_flight": in_flight,
        "sequences": sum(status["sequences"] for status in living.values()),
        "nodes": [{**n, "in_flight": of_nodes[n["id"]]} if "id" in n else n for n in mine["nodes"]],
        "refused_orders": [refused for status in living.values() for refused in status["refused_orders"]],
        "workers": [
            {"worker": worker, **({name: status[name] for name in brief} if status else {"state": "starting"})}
            for worker, status in found.items()
        ],
    }


def _is_of_process(family: Any) -> bool:
    if family.name == "pd_serve_router_node_attempts":  # "of this router"
        return True
    return not family.name.startswith(_OF_NODES)
