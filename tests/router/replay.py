"""A trace replayed in virtual time through the router's own placement: nodes are simulated, and nothing else.

    python -m tests.router.replay --nodes 5 8

Prefill nodes compute prompts one after the other at a constant rate, from the first chunk that their cache (least
recently used) lacks, and say what they do once a second, as engines do. Decode nodes are none of the question.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import itertools
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from pd_serve.api.text_model import TextModel
from pd_serve.router.groups import Registry
from pd_serve.router.nodes import Node
from pd_serve.router.policy import Placement, Terms, place
from pd_serve.wire import link
from pd_serve.wire.chunks import CHUNK_TOKENS
from tests.api import tiny

TRACE = Path(__file__).parent / "traces" / "mooncake_conversation_20min.jsonl.gz"
RATE = 10_000.0  # tokens a second of a prefill node
BLOCKS = 3_000  # of CHUNK_TOKENS, in its cache
STATUS_S = 1.0
SOON_S = 0.05  # where several routers submit: until the others hear of it


class Request(NamedTuple):
    arrival_s: float
    tokens: int
    names: list[int]


def trace() -> list[Request]:
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [Request(ms / 1000, tokens, [id + 1 for id in ids]) for ms, tokens, _, ids in rows]


class Work:
    """An attempt that nobody waits for."""

    def __init__(self, id: str) -> None:
        self.id = id

    def output(self, node: Node, output: link.Output, now_s: float) -> None: ...

    def lost(self, node: Node, why: str) -> None: ...


class SimulatedNode:
    """``ends``: what each router has of it."""

    def __init__(self, role: str, number: int, registries: Sequence[Registry]) -> None:
        info = msgspec.structs.replace(tiny.info(), max_model_len=1 << 20)
        hello = link.Hello(
            link.LINK_VERSION, f"{role}-{number}", role, f"http://{role}-{number}", info, "layout", "e", ("tcp://x",),
            "test", 0, link.Load(0, 0, 0, []),
        )  # fmt: skip
        self.id = hello.node_id
        self.ends = [Node(hello, lambda _: None) for _ in registries]
        self.last_submits = [0] * len(registries)
        self.cache: dict[int, None] = {}  # the least recently used first
        self.free_s = 0.0  # when all that it was sent is computed
        self.running: deque[float] = deque()  # when each will be
        for registry, end in zip(registries, self.ends, strict=True):
            if not registry.knows(info):
                registry.add_group(TextModel(tiny.bundle(), info))
            registry.add(end)

    def compute(self, request: Request, now_s: float) -> tuple[float, int]:
        """When it has the first token, and how many chunks were cached."""
        cached = next((at for at, name in enumerate(request.names) if name not in self.cache), len(request.names))
        self.free_s = max(now_s, self.free_s) + max(request.tokens - cached * CHUNK_TOKENS, 1) / RATE
        for name in reversed(request.names):
            self.cache.pop(name, None)
            self.cache[name] = None
        for name in list(itertools.islice(self.cache, max(0, len(self.cache) - BLOCKS))):
            del self.cache[name]
        self.running.append(self.free_s)
        return self.free_s, cached

    def status(self, router: int, now_s: float) -> link.Status:
        while self.running and self.running[0] <= now_s:
            self.running.popleft()
        load = link.Load(0, len(self.running), int(max(0.0, self.free_s - now_s) * RATE), [])
        return link.Status(load, last_submit=self.last_submits[router])


class Result(NamedTuple):
    hit_rate: float  # of chunks
    ttft_s: list[float]  # sorted
    placed: list[int]  # a node

    @property
    def mean_s(self) -> float:
        return sum(self.ttft_s) / len(self.ttft_s)

    def at(self, share: float) -> float:
        return self.ttft_s[int(share * (len(self.ttft_s) - 1))]


def replay(requests: Sequence[Request], num_nodes: int, *, by_prefix: bool, routers: int = 1) -> Result:
    """``by_prefix``: placement is told the prompts' names, else loads alone count. ``routers``: requests reach them in
    turn."""
    registries = [Registry() for _ in range(routers)]
    nodes = [SimulatedNode("prefill", number, registries) for number in range(num_nodes)]
    SimulatedNode("decode", 0, registries)
    groups = [group for registry in registries for group in registry.groups.values()]
    by_id = {one.id: one for one in nodes}
    placed = dict.fromkeys(by_id, 0)
    ttft_s: list[float] = []
    hits = total = 0
    order = itertools.count()
    events: list[tuple[float, int, object]] = [(request.arrival_s, next(order), request) for request in requests]
    until_s = max(request.arrival_s for request in requests)
    events += [(at_s, next(order), one) for one in nodes for at_s in _seconds(until_s, one.id)]
    heapq.heapify(events)
    while events:
        now_s, number, event = heapq.heappop(events)
        if isinstance(event, SimulatedNode):
            for router, registry in enumerate(registries):
                registry.status(event.ends[router], event.status(router, now_s))
        elif isinstance(event, Request):
            router = number % routers
            group = groups[router]
            chain = event.names[: event.tokens // CHUNK_TOKENS] if by_prefix else []
            terms = Terms(prompt_tokens=event.tokens, total_tokens=event.tokens + 1, turn=group.turn(), chain=chain)
            found = place(group.sources, group.targets, terms)
            assert isinstance(found, Placement) and found.prefill is not None
            one = by_id[found.prefill]
            work = Work(str(number))
            submit = link.Submit(work.id, bytes(4 * event.tokens), 0, link.SamplingParams(1, 0), handoff=True)
            group.sources.chosen(found.prefill)
            one.ends[router].submit(work, submit, found.cached)
            one.last_submits[router] += 1
            done_s, cached = one.compute(event, now_s)
            placed[found.prefill] += 1
            if routers > 1:
                heapq.heappush(events, (now_s + SOON_S, next(order), one))
            ttft_s.append(done_s - now_s)
            hits += cached
            total += len(event.names)
            heapq.heappush(events, (done_s, next(order), (router, one, work, chain, cached * CHUNK_TOKENS)))
        else:
            router, one, work, chain, cached_tokens = event  # type: ignore[misc]
            one.ends[router].release(work, abort=False)
            groups[router].computed(one.ends[router], chain, cached_tokens)
    return Result(hits / total, sorted(ttft_s), list(placed.values()))


def _seconds(until_s: float, id: str) -> Iterator[float]:
    """When a node speaks: not all of them at once."""
    at_s = zlib.crc32(id.encode()) % 1000 / 1000
    while at_s < until_s:
        yield at_s
        at_s += STATUS_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5, 8])
    requests = trace()
    for count in parser.parse_args().nodes:
        for by_prefix in (False, True):
            found = replay(requests, count, by_prefix=by_prefix)
            times = " ".join(f"p{share * 100:.0f} {found.at(share):.2f}" for share in (0.5, 0.9, 0.99))
            print(
                f"{count} prefill nodes, {'prefixes and load' if by_prefix else 'load alone':17s}: hit rate "
                f"{found.hit_rate:.3f}, TTFT mean {found.mean_s:.2f} {times} s, requests a node {found.placed}"
            )


if __name__ == "__main__":
    main()
