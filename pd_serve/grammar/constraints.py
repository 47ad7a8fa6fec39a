"""The engine's side: which tokens may come next in each sequence that has a grammar, as the grammar process says.

Called by the engine's main thread. Nothing is waited for but masks that are about to come: a sequence whose mask is not
there yet is not sampled in a step, and others go on. Without such sequences there is no process and nothing to do.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pd_serve.grammar.messages import (
    Close,
    Load,
    Open,
    Permitted,
    Tell,
    ToWorker,
    Unframed,
    decode_from_worker,
    framed,
    read,
)
from pd_serve.grammar.process import Process
from pd_serve.wire.link import Grammar

PATIENCE_S = 5e-3  # for masks, which take 0.05 ms each, before a step


class Constraint:
    """Of a sequence. ``mask``: int32 words, a bit a token, of what may be sampled after ``told`` output tokens; None:
    anything, the grammar has not begun. ``forced``: tokens that have to come first; ``mask`` is of what comes then.
    """

    __slots__ = (
        "begun",
        "error",
        "forced",
        "grammar",
        "heard",
        "id",
        "jumps",
        "lost",
        "mask",
        "opened",
        "stopped",
        "told",
    )

    def __init__(self, id: int, grammar: Grammar) -> None:
        self.id = id
        self.grammar = grammar
        self.jumps = False  # whether forced tokens are wanted
        self.begun = not grammar.after
        self.told = 0  # output tokens that it has heard of
        self.opened = False  # the grammar is compiled
        self.heard = False  # what ``mask`` says is so after ``told`` tokens
        self.mask: npt.NDArray[np.int32] | None = None
        self.forced: list[int] = []
        self.stopped = False  # only an end may come
        self.error = ""  # why it cannot go on
        self.lost = False  # for a reason that is not the grammar's

    def ready(self, num_output: int) -> bool:
        return self.heard and not self.forced and self.told == num_output

    def permits(self, token: int) -> bool:
        """After ``told`` output tokens."""
        return self.mask is None or bool(int(self.mask[token >> 5]) >> (token & 31) & 1)

    def take_forced(self) -> list[int]:
        """They are output now, which the grammar knows of."""
        forced, self.forced = self.forced, []
        self.told += len(forced)
        return forced


class Constraints:
    """For one model. ``tokenizer``: the path of its tokenizer.json."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos
        self._open: dict[int, Constraint] = {}
        self._ids = count(1)
        self._process: Process | None = None
        self._unframed = Unframed()
        self._unsent = bytearray()
        self._failed: list[Constraint] = []

    def fileno(self) -> int:
        """Readable where there is something to read; -1: there is no process."""
        return -1 if self._process is None else self._process.sock.fileno()

    def open(self, grammar: Grammar, output: list[int], *, jumps: bool = False, first: bool = False) -> Constraint:
        """``jumps``: whether forced tokens are wanted, which cost no step. ``first``: others sample the next token."""
        constraint = Constraint(next(self._ids), grammar)
        constraint.jumps = jumps
        self._open[constraint.id] = constraint
        self._start()
        news = self._begin(constraint, output)
        constraint.told = len(output)
        self._send(
            Open(constraint.id, "", Grammar(grammar.kind, grammar.text), news, jumps and constraint.begun and not first)
        )
        return constraint

    def tell(self, constraint: Constraint, news: list[int]) -> None:
        """The output tokens after those it was told of. Not before what was told before has been answered."""
        constraint.told += len(news)
        if not constraint.begun:
            news = self._begin(constraint, news)
        if constraint.begun:
            constraint.heard = False
            self._send(Tell(constraint.id, news, constraint.jumps))

    def close(self, constraint: Constraint) -> None:
        if self._open.pop(constraint.id, None) is not None and self._process is not None:
            self._send(Close(constraint.id))

    def wait(self, constraints: list[Constraint]) -> None:
        """For those masks of ``constraints`` that come at once."""
        self.receive()
        until_s = time.monotonic() + PATIENCE_S
        while any(c.opened and not c.heard and not c.error for c in constraints) and self._process is not None:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.sock], [], [], left_s)[0]:
                return
            self.receive()

    def receive(self) -> None:
        """What has come."""
        if self._process is None:
            return
        self._flush()
        while self._process is not None:
            try:
                data = read(self._process.sock)
            except BlockingIOError:
                return
            if not data:
                self._lost()
                return
            for payload in self._unframed.payloads(data):
                answer = decode_from_worker(payload)
                if isinstance(answer, Permitted) and (constraint := self._open.get(answer.id)) is not None:
                    self._take(constraint, answer)

    def failed(self) -> Iterator[Constraint]:
        """Those that cannot go on, each once."""
        while self._failed:
            yield self._failed.pop()

    def _take(self, constraint: Constraint, answer: Permitted) -> None:
        constraint.opened = True
        if answer.error:
            constraint.error = answer.error
            self._failed.append(constraint)
            return
        constraint.heard = True
        constraint.forced = answer.forced if constraint.begun else []
        constraint.stopped = answer.stopped and constraint.begun
        constraint.mask = np.frombuffer(answer.mask, "<i4") if constraint.begun else None

    def _begin(self, constraint: Constraint, news: list[int]) -> list[int]:
        """What of ``news`` the grammar is for."""
        if constraint.begun:
            return news
        for place, token in enumerate(news):
            if token in constraint.grammar.after:
                constraint.begun = True
                return news[place + 1 :]
        return []

    def _start(self) -> None:
        if self._process is None:
            self._process = Process()
            self._process.sock.setblocking(False)
            self._unframed = Unframed()
            self._unsent.clear()
            self._send(Load("", self._vocab_size, list(self._eos), path=str(self._tokenizer)))

    def _send(self, message: ToWorker) -> None:
        self._unsent += framed(message)
        self._flush()

    def _flush(self) -> None:
        """As much as the other end takes now; :meth:`receive` goes on."""
        while self._unsent and self._process is not None:
            try:
                del self._unsent[: self._process.sock.send(self._unsent)]
            except BlockingIOError:
                return
            except ConnectionError:
                self._lost()

    def _lost(self) -> None:
        """The process has died, and with it what it knew of every sequence."""
        self.shut()
        for constraint in self._open.values():
            if not constraint.error:
                constraint.lost = True
                constraint.error = "the process that finds permitted tokens has ended"
                self._failed.append(constraint)

    def shut(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
