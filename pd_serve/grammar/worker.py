"""``python -m pd_serve.grammar.worker FD``: the process beside a router or an engine in which llguidance works.

It is one of its own because a tokenizer takes llguidance seconds, in which no other thread of the process would run,
and because what clients write may be slow or large: a check runs in a child with a bound on its time and memory, and a
sequence whose masks are too slow is ended. It knows tokens and grammars, nothing of requests. It ends when the other
end of its socket is closed.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pd_serve.grammar.forms import LOWERED, NONE_LEFT, GrammarError, lower, one_line
from pd_serve.grammar.messages import (
    Check,
    Checked,
    Close,
    Load,
    Open,
    Permitted,
    Tell,
    Unframed,
    decode_to_worker,
    framed,
    read,
)
from pd_serve.wire.link import Grammar

COMPILE_S = 1.0  # of a processor
COMPILE_BYTES = 1 << 30
WORKER_BYTES = 6 << 30  # a tokenizer of 262,144 tokens takes 0.8 GB for a moment
KEPT = 64  # compiled grammars
# What masks of a sequence may take of a processor: most take 50 microseconds, and the first of a grammar milliseconds.
SPENT_S, MASK_S = 1.0, 2e-3
MAX_FORCED = 32  # tokens at once
# An object with a thousand properties that may be left out has 4,000 items in a row; time is what bounds them.
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_items_in_row=20_000, verbose_errors=False)
_TOO_SLOW = "it is too complex: finding the permitted tokens takes too long"
_TOO_LARGE = f"it takes more than {COMPILE_S:g} s or {COMPILE_BYTES >> 30} GiB to compile: make it smaller"


def _said(error: str) -> str:
    """Of a matcher that cannot go on."""
    if "NoExtensionBias" in error:
        return "nothing that could be written has this form"
    return f"it is too complex: {one_line(error)}"


class Sequence:
    """Where in its grammar an output is."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, *, allowed_s: float = SPENT_S) -> None:
        self._matcher = matcher
        self._mask_bytes = -(-vocab_size // 32) * 4
        self._allowed_s = allowed_s

    def permitted(self, id: int, tokens: list[int], *, jumps: bool = False) -> Permitted:
        """After ``tokens``, which came since, and with ``jumps`` after those that are forced then."""
        began_s = time.thread_time()
        if not self._matcher.consume_tokens(tokens):
            said = self._matcher.get_error()
            return Permitted(id, b"", error=NONE_LEFT if "satisfy the grammar" in said else _said(said))
        forced = self._matcher.compute_ff_tokens()[:MAX_FORCED] if jumps else []
        if forced and not self._matcher.consume_tokens(forced):
            return Permitted(id, b"", error="llguidance forces tokens that it does not permit")
        mask = self._matcher.compute_bitmask()
        self._allowed_s += MASK_S - (time.thread_time() - began_s)
        if self._matcher.is_error():
            return Permitted(id, b"", error=_said(self._matcher.get_error()))
        if self._allowed_s < 0:
            return Permitted(id, b"", error=_TOO_SLOW)
        return Permitted(id, mask[: self._mask_bytes], self._matcher.is_stopped(), forced=forced)


class Model:
    """A tokenizer, and what was compiled for it."""

    def __init__(self, load: Load) -> None:
        self.vocab_size = load.vocab_size
        text = load.tokenizer_json.decode() if load.tokenizer_json else Path(load.path).read_text("utf-8")
        try:
            self._tokenizer = LLTokenizer(text, n_vocab=load.vocab_size, eos_token=load.eos)
        except ValueError:  # it has more tokens than the model has logits
            self._tokenizer = LLTokenizer(text, eos_token=load.eos)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def special(self, text: str) -> int | None:
        """The token that a text is, where it is a special one."""
        ids = self._tokenizer.tokenize_str(text, parse_special=True)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special_token(ids[0]) else None

    def compiled(self, grammar: Grammar) -> Sequence | None:
        """One at its beginning, where that takes no time."""
        found = self._compiled.get(grammar)
        if found is None:
            return None
        self._compiled.move_to_end(grammar)
        return Sequence(found.deep_copy(), self.vocab_size)

    def compile(self, grammar: Grammar) -> Sequence:
        """Raises GrammarError."""
        matcher = LLMatcher(self._tokenizer, lower(grammar, self.special), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        self._compiled[grammar] = matcher
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return Sequence(matcher.deep_copy(), self.vocab_size)

    def check(self, grammar: Grammar) -> Checked:
        """Compiles it, and finds the first permitted tokens."""
        try:
            lowered = lower(grammar, self.special)
            first = self.compile(Grammar(LOWERED, lowered)).permitted(0, [])
        except GrammarError as error:
            return Checked("", str(error))
        return Checked(lowered, first.error)


class Worker:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._models: dict[str, Model] = {}
        self._sequences: dict[int, Sequence | None] = {}  # None: being compiled
        self._threads = ThreadPoolExecutor(1)  # llguidance lets others run while it compiles
        self._lock = threading.Lock()

    def run(self) -> None:
        unframed = Unframed()
        while data := read(self._sock):
            for payload in unframed.payloads(data):
                self._do(payload)

    def _do(self, payload: bytes) -> None:
        match message := decode_to_worker(payload):
            case Load():
                self._models[message.model] = Model(message)
            case Check():
                self._check(message)
            case Open():
                self._open(message)
            case Tell():
                if (sequence := self._sequences.get(message.id)) is not None:
                    self._answer(_permitted(sequence, message))
            case Close():
                with self._lock:
                    self._sequences.pop(message.id, None)

    def _check(self, message: Check) -> None:
        """In a child, which the kernel ends where it takes too much."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _bound()
                self._answer(self._models[message.model].check(message.grammar))
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            self._answer(Checked("", _TOO_LARGE))

    def _open(self, message: Open) -> None:
        model = self._models[message.model]
        if (sequence := model.compiled(message.grammar)) is not None:
            self._sequences[message.id] = sequence
            self._answer(_permitted(sequence, message))
            return
        self._sequences[message.id] = None
        self._threads.submit(self._compile, model, message)

    def _compile(self, model: Model, message: Open) -> None:
        try:
            sequence = model.compiled(message.grammar) or model.compile(message.grammar)
            answer = _permitted(sequence, message)
        except GrammarError as error:
            answer = Permitted(message.id, b"", error=str(error))
        except BaseException as error:  # a panic of llguidance
            answer = _panic(message.id, error)
        else:
            with self._lock:
                if message.id in self._sequences:
                    self._sequences[message.id] = sequence
        self._answer(answer)

    def _answer(self, answer: Checked | Permitted) -> None:
        with self._lock:
            self._sock.sendall(framed(answer))


def _permitted(sequence: Sequence, message: Open | Tell) -> Permitted:
    """Whatever llguidance does."""
    try:
        return sequence.permitted(message.id, message.tokens, jumps=message.jumps)
    except BaseException as error:
        return _panic(message.id, error)


def _panic(id: int, error: BaseException) -> Permitted:
    """Rust's panics are no Exception."""
    return Permitted(id, b"", error=f"llguidance fails: {one_line(repr(error))}")


def _bound() -> None:
    """Of a check, from here on: its processor and what memory it takes more."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, COMPILE_S)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    _limit_memory(pages * resource.getpagesize() + COMPILE_BYTES)


def _limit_memory(size: int) -> None:
    """The process ends, and leaves no core, where more is asked for."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory(WORKER_BYTES)
    sock = socket.socket(fileno=int(sys.argv[1]))
    try:
        Worker(sock).run()
    except ConnectionError:
        pass  # the other end is gone
    os._exit(0)  # whatever is being compiled is for nobody


if __name__ == "__main__":
    main()
