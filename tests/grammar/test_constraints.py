"""Masks of permitted tokens, as an engine gets them from the grammar process, over a tiny tokenizer."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.grammar import worker
from pd_serve.grammar.constraints import Constraint, Constraints
from pd_serve.wire.link import Grammar
from tests.api import tiny

TEXT = TextTokenizer(tiny.byte_level())
VOCAB = TEXT.size + 5
EOS = tiny.EOS
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Constraints]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tiny.byte_level())
    made = Constraints(path, VOCAB, (EOS,))
    yield made
    made.shut()


def heard(constraints: Constraints, constraint: Constraint) -> set[int]:
    """The permitted tokens."""
    deadline_s = time.monotonic() + 30
    while not constraint.heard and not constraint.error:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
        constraints.receive()
    assert not constraint.error, constraint.error
    assert constraint.mask is not None
    bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
    assert not bits[VOCAB:].any()
    return set(np.flatnonzero(bits).tolist())


def draw(constraints: Constraints, grammar: Grammar, seed: int, most: int = 400) -> str:
    """The text of a model that knows nothing."""
    constraint, output, random_ = constraints.open(grammar, []), [], random.Random(seed)
    while len(output) < most:
        permitted = heard(constraints, constraint)
        if constraint.stopped:
            assert permitted == {EOS}
        output.append(random_.choice(sorted(permitted)))
        if output[-1] == EOS:
            break
        constraints.tell(constraint, output[-1:])
    constraints.close(constraint)
    assert output[-1] == EOS, "it does not end"
    return TEXT.decode(output[:-1], skip_special_tokens=False)


def test_what_is_drawn_is_what_the_grammar_says(constraints: Constraints) -> None:
    for seed in range(4):
        person = json.loads(draw(constraints, Grammar("json_schema", json.dumps(PERSON)), seed))
        assert set(person) == {"name", "age"} and len(person["name"]) <= 8 and 0 <= person["age"] <= 99
        assert re.fullmatch(r"[a-c]{2}-\d{3}", draw(constraints, Grammar("regex", r"^[a-c]{2}-\d{3}$"), seed))
        choices = ["yes", "no", 'a "quoted\n" 東京']
        assert draw(constraints, Grammar("choice", json.dumps(choices)), seed) in choices
        ebnf = 'root ::= pair ("," pair)?\npair ::= [a-z] "=" [0-9]'
        assert re.fullmatch(r"[a-z]=\d(,[a-z]=\d)?", draw(constraints, Grammar("ebnf", ebnf), seed))
        assert draw(constraints, Grammar("lark", 'start: "x" | "yy"'), seed) in ("x", "yy")


def test_a_sequence_goes_on_where_another_node_left_it(constraints: Constraints) -> None:
    grammar, output = Grammar("json_schema", json.dumps(PERSON)), TEXT.encode('{"name":"a', add_special_tokens=False)
    one = constraints.open(grammar, [])
    heard(constraints, one)
    for end in range(1, len(output) + 1):
        constraints.tell(one, output[end - 1 : end])
        assert not one.ready(end)
        permitted = heard(constraints, one)
        assert one.ready(end)
    other = constraints.open(grammar, output)
    assert heard(constraints, other) == permitted


def test_a_grammar_begins_after_its_token(constraints: Constraints) -> None:
    begin = TEXT.encode("<tool>", add_special_tokens=False)[0]
    thoughts = TEXT.encode("well", add_special_tokens=False)
    constraint = constraints.open(Grammar("choice", '["a"]', after=(begin,)), thoughts)
    while not constraint.heard:
        time.sleep(0.001)
        constraints.receive()
    assert constraint.mask is None
    constraints.tell(constraint, [7])
    assert constraint.ready(len(thoughts) + 1) and constraint.mask is None
    constraints.tell(constraint, [begin])
    assert heard(constraints, constraint) == set(TEXT.encode("a", add_special_tokens=False))
    late = constraints.open(constraint.grammar, [*thoughts, begin, *TEXT.encode("a", add_special_tokens=False)])
    assert heard(constraints, late) == {EOS} and late.stopped


def test_what_cannot_go_on_says_why(constraints: Constraints) -> None:
    wrong = constraints.open(Grammar("choice", '["a"]'), TEXT.encode("b", add_special_tokens=False))
    broken = constraints.open(Grammar("regex", "("), [])
    fine = constraints.open(Grammar("choice", '["a"]'), [])
    heard(constraints, fine)
    while not (wrong.error and broken.error):
        time.sleep(0.001)
        constraints.receive()
    assert "permit none" in wrong.error and "unclosed group" in broken.error
    assert set(constraints.failed()) == {wrong, broken}


def test_an_object_of_a_thousand_properties_that_may_be_left_out(constraints: Constraints) -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}
    output = TEXT.encode('{"p7": 1, "p70', add_special_tokens=False)
    assert heard(constraints, constraints.open(Grammar("json_schema", json.dumps(wide)), output))


def test_masks_that_take_long_end_their_sequence(constraints: Constraints) -> None:
    tokenizer = LLTokenizer(tiny.byte_level().decode(), n_vocab=VOCAB, eos_token=[EOS])
    grammar = LLMatcher.grammar_from_regex("a+")
    sequence = worker.Sequence(LLMatcher(tokenizer, grammar), VOCAB, allowed_s=-worker.MASK_S)
    assert "too complex" in sequence.permitted(1, []).error


def test_a_process_that_dies_fails_what_it_knew_and_comes_again(constraints: Constraints) -> None:
    constraint = constraints.open(Grammar("regex", "a+"), [])
    heard(constraints, constraint)
    process = constraints._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    while not constraint.error:
        time.sleep(0.001)
        constraints.receive()
    assert constraint.lost and constraints.fileno() == -1
    assert draw(constraints, Grammar("regex", "b{3}"), 0) == "bbb"
