"""What routing costs with thousands of nodes: CPU time of one decision, of a join, and of a status.

Runs the router's own objects (registry, groups, placement) over fake nodes, whose frames are dropped (those of joins
are encoded first):

    python benchmarks/placement.py --nodes 1024 10000

A *decision* is what a stream does to be placed: terms and placement; its prompt's names are made before, as its tokens
are. *Books*: what then changes of both nodes. Half of the nodes are prefill nodes. Loads are random, and follow what is
placed.
"""

from __future__ import annotations

import argparse
import random
import time
import timeit

import msgspec

from pd_serve.api.text_model import TextModel
from pd_serve.router.groups import Group, Registry
from pd_serve.router.nodes import Node
from pd_serve.router.policy import Placement, Terms, place
from pd_serve.wire import link
from pd_serve.wire.chunks import CHUNK_TOKENS, chain
from tests.api import tiny

INFO = msgspec.structs.replace(tiny.info(), max_model_len=131_072)
PROMPTS = 200
PROMPT_TOKENS = 16 * CHUNK_TOKENS


class Network:
    """Counts what would be sent, while it is open."""

    def __init__(self) -> None:
        self.frames = self.size_bytes = 0
        self.open = True

    def send(self, message: link.ToNode) -> None:
        if self.open:
            self.frames += 1
            self.size_bytes += len(link.encoder.encode(message))


class Work:
    def __init__(self, id: str) -> None:
        self.id = id

    def output(self, node: Node, output: link.Output, now_s: float) -> None: ...

    def lost(self, node: Node, why: str) -> None: ...


def node(number: int, role: str, network: Network) -> Node:
    host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    load = link.Load(0, random.randrange(40), random.randrange(20_000), [link.GroupUsage(4000, 1000, 2000, 1000)])
    return Node(
        link.Hello(
            link.LINK_VERSION, f"{role}@{host}:8100", role, f"http://{host}:8100", INFO, "layout", "e" * 32,
            (f"tcp://{host}:43000",), "nixl", 64, load,
        ),
        network.send,
    )  # fmt: skip


def percentiles(values: list[float]) -> str:
    values.sort()
    at = [values[min(len(values) - 1, int(share * len(values)))] * 1e6 for share in (0.5, 0.9, 0.99)]
    return f"p50 {at[0]:6.1f}  p90 {at[1]:6.1f}  p99 {at[2]:6.1f}  mean {sum(values) / len(values) * 1e6:6.1f} us"


def joins(count: int, network: Network) -> tuple[Group, list[Node]]:
    registry = Registry()
    group = registry.add_group(TextModel(tiny.bundle(), INFO))
    nodes = [node(number, ("prefill", "decode")[number % 2], network) for number in range(count)]
    begun_s = time.process_time()
    for one in nodes:
        registry.add(one)
    taken_s = time.process_time() - begun_s
    print(
        f"{count:6d} nodes join: {taken_s:6.2f} s CPU, {network.frames / count:.1f} frames and "
        f"{network.size_bytes / count / 1000:.1f} kB a join"
    )
    return group, nodes


def decisions(group: Group, count: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each decision, and of its books."""
    prompts = [random.randbytes(4 * PROMPT_TOKENS) for _ in range(PROMPTS)]
    names = [chain(group.info.fingerprint, prompt) for prompt in prompts]
    for known in names:
        for _ in range(4):
            group.sources.prefixes.stored(random.choice(list(group.prefill)), known[: random.randrange(1, 16)])
            group.targets.prefixes.stored(random.choice(list(group.decode)), known[: random.randrange(1, 16)])
    sampling = link.SamplingParams(max_tokens=100, seed=1)
    source = link.Source("x", "e", ("tcp://x",))
    times, books = [], []
    for number in range(count):
        which = random.randrange(PROMPTS)
        work = Work(f"a{number}")
        submits = [
            link.Submit(work.id, prompts[which], 0, sampling, handoff=True),
            link.Submit(work.id, prompts[which], 0, sampling, source=source),
        ]
        begun_s = time.process_time()
        terms = Terms(
            prompt_tokens=PROMPT_TOKENS,
            total_tokens=PROMPT_TOKENS + 100,
            unfit=group.unfit().keys(),
            unwell=group.troubles(due=False),
            turn=group.turn(),
            chain=names[which],
        )
        found = place(group.sources, group.targets, terms)
        times.append(time.process_time() - begun_s)
        begun_s = time.process_time()
        assert isinstance(found, Placement) and found.prefill is not None and found.decode is not None
        group.sources.chosen(found.prefill)
        group.targets.chosen(found.decode)
        group.prefill[found.prefill].submit(work, submits[0], found.cached)
        group.decode[found.decode].submit(work, submits[1])
        books.append(time.process_time() - begun_s)
    return times, books


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[32, 1024, 10_000])
    parser.add_argument("--decisions", type=int, default=5000)
    given = parser.parse_args()
    random.seed(0)
    unit = min(timeit.repeat("[i for i in range(100)]", number=2000, repeat=20)) / 2000 * 1e6
    print(f"this machine now: a list of 100 numbers takes {unit:.1f} us")
    for count in given.nodes:
        network = Network()
        group, nodes = joins(count, network)
        network.open = False
        times, books = decisions(group, given.decisions)
        print(f"{count:6d} nodes, a decision: {percentiles(times)}")
        print(f"{count:6d} nodes, its books:  {percentiles(books)}")
        statuses = []
        registry = Registry()
        registry.groups[(group.info.name, group.info.fingerprint)] = group
        for one in nodes:
            load = msgspec.structs.replace(one.load, running=one.load.running + 1)
            begun_s = time.process_time()
            registry.status(one, link.Status(load))
            statuses.append(time.process_time() - begun_s)
        print(f"{count:6d} nodes, a status:   {percentiles(statuses)}")


if __name__ == "__main__":
    main()
