"""Grammars as a router has them checked: good ones in the nodes' form, others with what is wrong, in bounded time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from pd_serve.grammar.checker import Busy, Checker, Tokenizer
from pd_serve.grammar.forms import LOWERED, MAX_TEXT, GrammarError
from pd_serve.wire.link import Grammar
from tests.api import tiny

TOKENIZER = Tokenizer("m", tiny.byte_level(), 450, [tiny.EOS])
TAKES = "takes "  # more than 1 s to compile, or too long to find the first tokens


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker()
    yield made
    made.close()


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


async def test_hostile_grammars_are_refused(checker: Checker) -> None:
    hostile = [
        (Grammar("json_schema", json.dumps(nested(300))), "recursion limit"),
        (Grammar("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(9000)}})), TAKES),
        (Grammar("regex", "a" * (MAX_TEXT + 1)), "at most"),
        (Grammar("ebnf", "root ::= " + "(" * 5000), ""),
        (Grammar("lark", "start: start"), ""),
        (Grammar("regex", r"[^\s\S]"), "nothing that could be written"),
        (Grammar("choice", "[1]"), ""),
        (Grammar("magic", ""), "no kind 'magic'"),
        (Grammar("json_schema", '{"enum": []}'), ""),
    ]
    for grammar, why in hostile:
        with pytest.raises(GrammarError) as caught:
            await checker.lowered(TOKENIZER, grammar)
        assert why in str(caught.value) and len(str(caught.value)) <= 500

    slow = Grammar("regex", "(a{1000}){1000}{1000}")  # 0.4 s of one processor, more than 1 s of another
    try:
        assert (await checker.lowered(TOKENIZER, slow)).kind == LOWERED
    except GrammarError as error:
        assert TAKES in str(error)

    good = Grammar("json_schema", '{"type": "integer"}', after=(7,))
    lowered = await checker.lowered(TOKENIZER, good)
    assert lowered.kind == LOWERED and lowered.after == (7,) and "integer" in lowered.text


async def test_a_check_stalls_nobody(checker: Checker) -> None:
    """All of it is the other process's: while that one is stopped, nothing comes of it, and the loop turns."""
    await checker.lowered(TOKENIZER, Grammar("regex", "a"))
    assert checker._process is not None
    os.kill(checker._process.pid, signal.SIGSTOP)
    try:
        check = asyncio.create_task(checker.lowered(TOKENIZER, Grammar("regex", "b")))
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert not check.done()
    finally:
        os.kill(checker._process.pid, signal.SIGCONT)
    assert (await check).kind == LOWERED


async def test_the_same_grammar_is_checked_once(checker: Checker) -> None:
    grammar = Grammar("regex", "a{1,50}")
    many = await asyncio.gather(*(checker.lowered(TOKENIZER, grammar) for _ in range(100)))
    assert len(set(many)) == 1
    others = [Grammar("regex", f"b{{{i}}}") for i in range(1, 100)]
    found = await asyncio.gather(*(checker.lowered(TOKENIZER, g) for g in others), return_exceptions=True)
    assert any(isinstance(each, Busy) for each in found) and not isinstance(found[0], Exception)


async def test_a_checker_that_dies_is_there_again(checker: Checker) -> None:
    await checker.lowered(TOKENIZER, Grammar("regex", "a"))
    assert checker._process is not None
    os.kill(checker._process.pid, signal.SIGKILL)
    with pytest.raises(Busy):
        await checker.lowered(TOKENIZER, Grammar("regex", "b"))
    assert await checker.lowered(TOKENIZER, Grammar("regex", "b"))
