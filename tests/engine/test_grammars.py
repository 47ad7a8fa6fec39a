"""Sequences with a grammar in the engine's loop: whatever it is busy with, each follows its grammar, token by token.

The grammar process is real; the executor is the fake one, which samples the same token wherever it is asked to.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pd_serve.grammar.constraints import Constraints
from pd_serve.wire import link
from tests.engine.fake import EOS, VOCAB, next_token
from tests.engine.test_loop import Request, Stream, World

LETTERS = "abcdefghi"  # tokens 0, 2, 3, …
IDS = {letter: place + (place > 0) for place, letter in enumerate(LETTERS)}
CHOICES = ["abcabcabc", "abd", "bcdbcdbcdbcd", "bcddcb", "iiiiiiiiiiiiiiii", "i", "cafe"]
THOUGHT = IDS["e"]  # ends a model's thoughts


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Constraints]:
    tokenizer = Tokenizer(models.BPE({**IDS, "<e>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<e>", special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    made = Constraints(path, VOCAB, (EOS,))
    yield made
    made.shut()


class Constrained(Request):
    """Output is one of CHOICES; with ``after`` thoughts come first."""

    def _next(self, tokens: list[int]) -> int:
        p, index = self.sampling, len(tokens) - len(self.prompt)
        return next_token(tuple(tokens), p.seed, index, self._forbidden(tokens[len(self.prompt) :], index))

    def _forbidden(self, output: list[int], index: int) -> set[int]:
        assert self.sampling.grammar is not None
        if self.sampling.grammar.after:
            if THOUGHT not in output:
                return set()
            output = output[output.index(THOUGHT) + 1 :]
        said = "".join(LETTERS[id - (id > 0)] for id in output if id != EOS)
        permitted = {IDS[choice[len(said)]] for choice in CHOICES if choice.startswith(said) and choice != said}
        may_end = said in CHOICES and (not permitted or index >= self.sampling.min_tokens)
        return {*range(VOCAB)} - permitted - ({EOS} if may_end else set())

    def _finish(self, tokens: list[int]) -> str | None:
        return "stop" if tokens[-1] == EOS else super()._finish(tokens)


def request(random_: random.Random, kind: str, *, thinks: bool) -> Request:
    grammar = link.Grammar("choice", json.dumps(CHOICES), (THOUGHT,) if thinks else ())
    sampling = link.SamplingParams(
        max_tokens=30,
        seed=random_.getrandbits(64),
        grammar=grammar,
        min_tokens=random_.choice([0, 3]) if not thinks else 0,
        ignore_eos=random_.random() < 0.3 and not thinks,
        presence_penalty=random_.choice([0.0, 0.0, 0.5]),
    )
    prompt = tuple(random_.choices(range(2, 10), k=random_.randint(1, 14)))
    made = Constrained(kind, prompt, 0, random_.randint(0, 5), sampling)
    known = min(random_.choice([0, 2]), len(made.text()[0]) - 1) if kind == "local" else 0
    return replace(made, known=known)


@pytest.mark.parametrize("depth", [0, 1])
def test_each_follows_its_grammar_whatever_happens(depth: int, constraints: Constraints) -> None:
    random_ = random.Random(depth)
    preempted = forced = 0
    for _ in range(6):
        world = World(depth, blocks=13, budget=20, windowed=False, constraints=constraints)
        for number in range(8):
            kind = random_.choice(["local", "local", "handoff"])
            world.happens("submit", request(random_, kind, thinks=random_.random() < 0.3))
            plain = link.SamplingParams(max_tokens=20, seed=number)
            world.happens("submit", Request("local", tuple(range(2, 9)), 0, 0, plain))
            for _ in range(random_.randint(0, 4)):
                world.turn()
        world.happens("abort", 2)
        deadline_s = time.monotonic() + 20
        while world.engine._seqs or world.engine.load().leases:
            assert time.monotonic() < deadline_s, "it never ends"
            world.role.due.append("release")
            if not world.turn():
                time.sleep(0.001)
        preempted += world.scheduler.num_preemptions
        forced += world.engine._counters["forced_tokens"]
        for stream in world.wire.streams.values():
            check(stream)
    assert preempted and (forced > 5) == (depth == 0) and not constraints._open


def check(stream: Stream) -> None:
    text, finish = stream.request.text()
    heard = [token for output in stream.heard for token in output.tokens]
    assert heard == text[stream.request.known :][: len(heard) if stream.silent else None]
    assert stream.silent or stream.heard[-1].finish == finish
