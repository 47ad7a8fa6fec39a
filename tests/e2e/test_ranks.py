"""Tensor parallelism on either side of a transfer, in the layout's sense and in processes: the text stays the same.

A prefill rank here computes the whole model on memory of its own and announces its share of the heads; a decode rank
keeps its share. What computes on several devices comes later; what must fit together is here.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.step import Step
from pd_serve.decode.inbox import Arrived, Offered
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.pool import HostPool
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.wire.link import Source
from tests.e2e import tiny_model
from tests.transfer.harness import DecodeEnd, PrefillEnd, until
from tests.transfer.processes import Killable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(100)]

SIZE = dataclasses.replace(tiny_model.TINY, heads=8, kv_heads=4, head_dim=16)
BLOCK, BLOCKS = 16, 24
PROMPT = np.random.default_rng(5).integers(3, 200, 150).tolist()
CHUNKS = [0, 64, 100, 150]
NEW_TOKENS = 40
TABLE = np.random.default_rng(6).permutation(np.arange(1, BLOCKS))[:12].astype(np.int32)  # at every node
NUM_PROMPT_BLOCKS = -(-len(PROMPT) // BLOCK)


def share(rank: int, ranks: int) -> KVLayout:
    heads = SIZE.kv_heads // ranks
    group = kv_group(tuple(range(SIZE.layers)), heads, SIZE.head_dim, None, rank * heads, SIZE.kv_heads)
    return KVLayout(BLOCK, "float32", (group,))


class Computer:
    """The whole model, over a pool of its own."""

    def __init__(self, directory: Path) -> None:
        config = ModelConfig.from_directory(directory)
        layout = share(0, 1)
        self._pool = HostPool(layout, (BLOCKS,))
        [region] = self._pool.tensors()
        self.kv = region.numpy().view("<f4").reshape(BLOCKS, *layout.block_shape(0))
        self._runner = Runner(load_decoder(directory, config, "float32", ops=ops), config, layout, [region], 1)

    def step(self, tokens: list[int], begin: int) -> int:
        """Computes ``tokens[begin:]``; returns the most likely next one."""
        positions = np.arange(begin, len(tokens), dtype=np.int64)
        logits = self._runner.execute(
            Step(
                tokens=np.array(tokens[begin:], np.int64),
                positions=positions,
                query_start=np.array([0, len(positions)], np.int32),
                seq_lens=np.array([len(tokens)], np.int32),
                slots=[TABLE[positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK],
                block_tables=[TABLE[None, : -(-len(tokens) // BLOCK)]],
                logits_rows=np.array([len(positions) - 1]),
                num_decode=int(len(positions) == 1 and begin > 0),
            )
        )
        return int(logits[0].argmax())

    def decode(self, first: int) -> list[int]:
        """What follows the prompt, whose KV is here, and its first token."""
        text = [first]
        while len(text) < NEW_TOKENS:
            text.append(self.step(PROMPT + text, len(PROMPT) + len(text) - 1))
        return text


def text_of_one_node(directory: Path) -> list[int]:
    computer = Computer(directory)
    return computer.decode(computer.step(PROMPT, 0))


def prefill(directory: Path, end: PrefillEnd, key: str) -> None:
    """A prefill rank: computes in chunks, and announces its heads of each."""
    computer = Computer(directory)
    plane = end.pool.layout.groups[0].planes[0]
    ours = end.pool.groups[0].view("<f4").reshape(BLOCKS, *end.pool.layout.block_shape(0))
    end.outbox.open(key)
    announced = 0
    for begin, upto in itertools.pairwise(CHUNKS):
        token = computer.step(PROMPT[:upto], begin)
        last = upto == len(PROMPT)
        ready = NUM_PROMPT_BLOCKS if last else upto // BLOCK
        blocks = TABLE[announced:ready]
        ours[blocks] = computer.kv[blocks][:, :, :, plane.first_head : plane.end_head]
        end.publish_blocks(key, upto, [(0, announced, blocks.tolist())], token if last else None)
        announced = ready


def rank_options(rank: int, ranks: int) -> dict[str, Any]:
    return {"me": {"epoch": "e", "rank": rank, "ranks": ranks, "secret": b"s"}}


def _prefill_rank(pipe: Connection, directory: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    end = PrefillEnd(share(rank, ranks), BLOCKS, **rank_options(rank, ranks))
    pipe.send(end.source.addresses[0])
    prefill(directory, end, pipe.recv())
    pipe.send(until(lambda: end.why("k")))


def _decode_rank(pipe: Connection, rank: int, ranks: int) -> None:
    end = DecodeEnd(share(rank, ranks), BLOCKS, **rank_options(rank, ranks))
    pipe.send("ready")
    source: Source = pipe.recv()
    first = pull(end, source)
    pipe.send((first, end.pool.groups[0]))


def pull(end: DecodeEnd, source: Source) -> int:
    end.inbox.expect("k", source)
    end.wait("k", Offered, 30)
    end.accept("k", [TABLE[:NUM_PROMPT_BLOCKS].tolist()])
    return end.wait("k", Arrived, 30).first_token


class Rank(Killable):
    def __init__(self, target: Any, *args: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, child = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(child, *args), daemon=True)
        self.process.start()
        child.close()

    def hear(self) -> Any:
        assert self._pipe.poll(40), "a rank does not answer"
        return self._pipe.recv()

    def say(self, what: object) -> None:
        self._pipe.send(what)


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model"), SIZE)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_two_prefill_ranks_feed_one_decode_node(model: Path, ranks: list[Rank]) -> None:
    ranks += [Rank(_prefill_rank, model, rank, 2) for rank in range(2)]
    expected = text_of_one_node(model)
    source = Source("P", "e", tuple(rank.hear() for rank in ranks))
    node = DecodeEnd(share(0, 1), BLOCKS, me={"secret": b"s"})
    for rank in ranks:
        rank.say("k")
    first = pull(node, source)
    computer = Computer(model)
    computer.kv[:] = node.pool.groups[0].view("<f4").reshape(computer.kv.shape)
    assert computer.decode(first) == expected
    computer.kv[:, :, :, : SIZE.kv_heads // 2] = 0
    assert computer.decode(first) != expected, "a half shows as much as the whole"
    assert len(set(expected)) > NEW_TOKENS // 4, "a text that says the same over and over shows nothing"
    assert [rank.hear() for rank in ranks] == ["released", "released"]
    node.close()


def test_one_prefill_node_feeds_two_decode_ranks(model: Path, ranks: list[Rank]) -> None:
    ranks += [Rank(_decode_rank, rank, 2) for rank in range(2)]
    node = PrefillEnd(share(0, 1), BLOCKS, me={"epoch": "e", "secret": b"s"})
    for rank in ranks:
        assert rank.hear() == "ready"
        rank.say(node.source)
    prefill(model, node, "k")
    computer = Computer(model)
    first = set()
    for number, rank in enumerate(ranks):
        token, held = rank.hear()
        plane, shape = share(number, 2).groups[0].planes[0], share(number, 2).block_shape(0)
        computer.kv[:, :, :, plane.first_head : plane.end_head] = held.view("<f4").reshape(BLOCKS, *shape)
        first.add(token)
    assert len(first) == 1
    assert computer.decode(first.pop()) == text_of_one_node(model)
    assert until(lambda: node.why("k")) == "released"
    node.close()
