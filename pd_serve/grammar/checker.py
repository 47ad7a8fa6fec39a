"""The router's side: whether grammars can be compiled, found out in a process of its own and remembered.

The same grammar comes with many requests: each is checked once, whether it can be compiled or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import NamedTuple

from pd_serve.errors import PDServeError
from pd_serve.grammar.forms import LOWERED, GrammarError
from pd_serve.grammar.messages import Check, Checked, Load, Unframed, decode_from_worker, framed
from pd_serve.grammar.process import Process
from pd_serve.wire.link import Grammar

log = logging.getLogger(__name__)

KEPT = 256
MAX_WAITING = 64
ANSWER_S = 60.0  # a tokenizer takes seconds to load, and many times that on a busy machine
_READ_BYTES = 1 << 18


class Busy(PDServeError):
    """Too many grammars are to be checked already, or their process does not answer: later may be better."""


class Tokenizer(NamedTuple):
    """``key``: what it is known by."""

    key: str
    tokenizer_json: bytes
    vocab_size: int
    eos: list[int]


class Checker:
    """On a running loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, Grammar], asyncio.Task[Checked]] = OrderedDict()
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._loaded: set[str] = set()

    async def lowered(self, tokenizer: Tokenizer, grammar: Grammar) -> Grammar:
        """In the form that nodes compile at once. Raises GrammarError where it cannot be compiled, and Busy."""
        plain = Grammar(grammar.kind, grammar.text)
        key = tokenizer.key, plain
        task = self._known.get(key)
        if task is None:
            if self._waiting >= MAX_WAITING:
                raise Busy("too many grammars are being checked")
            self._waiting += 1
            task = self._known[key] = asyncio.create_task(self._checked(tokenizer, plain))
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        try:
            found = await asyncio.shield(task)  # others may wait for it, too
        except Busy:
            self._known.pop(key, None)
            raise
        if found.error:
            raise GrammarError(found.error)
        return Grammar(LOWERED, found.lowered, grammar.after)

    async def _checked(self, tokenizer: Tokenizer, grammar: Grammar) -> Checked:
        try:
            async with self._turn:
                return await asyncio.wait_for(self._ask(tokenizer, grammar), ANSWER_S)
        except (OSError, EOFError, TimeoutError) as error:
            log.error("the process that checks grammars is started anew: %r", error)
            self.close()
            raise Busy("the process that checks grammars did not answer") from None
        finally:
            self._waiting -= 1

    async def _ask(self, tokenizer: Tokenizer, grammar: Grammar) -> Checked:
        loop = asyncio.get_running_loop()
        if self._process is None:
            self._process = Process()
            self._process.sock.setblocking(False)
        sock = self._process.sock
        if tokenizer.key not in self._loaded:
            self._loaded.add(tokenizer.key)
            load = Load(tokenizer.key, tokenizer.vocab_size, tokenizer.eos, tokenizer.tokenizer_json)
            await loop.sock_sendall(sock, framed(load))
        await loop.sock_sendall(sock, framed(Check(tokenizer.key, grammar)))
        unframed = Unframed()
        while data := await loop.sock_recv(sock, _READ_BYTES):
            for payload in unframed.payloads(data):
                answer = decode_from_worker(payload)
                assert isinstance(answer, Checked)
                return answer
        raise EOFError("it has ended")

    def close(self) -> None:
        self._loaded.clear()
        if self._process is not None:
            self._process.close()
            self._process = None
