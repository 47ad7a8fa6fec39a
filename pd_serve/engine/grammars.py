"""The engine's sequences that have a grammar: the grammar process hears what was sampled, and says what may come next.

Without such sequences a step costs nothing for it. How masks come: :mod:`pd_serve.grammar.constraints`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pd_serve.engine.sequence import Sequence, State
from pd_serve.grammar.constraints import Constraint, Constraints
from pd_serve.grammar.forms import NONE_LEFT, missing
from pd_serve.wire.link import Failure, Grammar

_CANNOT = "the grammar of the output cannot be followed"


class Grammars:
    """``constraints`` None: there are none here."""

    def __init__(self, constraints: Constraints | None, *, jumps: bool) -> None:
        """``jumps``: whether tokens that are forced may take no step of their own."""
        self._constraints = constraints
        self._jumps = jumps
        self._open: dict[Sequence, Constraint] = {}

    @property
    def missing(self) -> str:
        """Why no sequence with a grammar can be taken; empty where one can."""
        return "this engine knows no grammars" if self._constraints is None else missing()

    def fileno(self) -> int:
        """Readable where something has come; -1: nothing can."""
        return -1 if self._constraints is None else self._constraints.fileno()

    def open(self, seq: Sequence, grammar: Grammar) -> None:
        assert self._constraints is not None  # its submit was not refused
        output = seq.tokens[seq.num_prompt :].tolist()
        # Where logits are changed, or told, each token is sampled; and a prefill node is done with the first one.
        jumps = self._jumps and not (seq.adjusted or seq.handoff or seq.sampling.logprobs >= 0)
        first = seq.source is not None  # where the prompt comes from, its first token is sampled
        seq.constraint = self._open[seq] = self._constraints.open(grammar, output, jumps=jumps, first=first)

    def tell(self) -> None:
        """What was sampled. Sequences that have ended are let go of."""
        if not self._open:
            return
        assert self._constraints is not None
        for seq, constraint in list(self._open.items()):
            if seq.state is State.FINISHED:
                del self._open[seq]
                self._constraints.close(constraint)
            elif constraint.heard and constraint.told != seq.output_index:
                self._constraints.tell(constraint, seq.tokens[seq.num_prompt + constraint.told :].tolist())

    def forced(self) -> Iterator[tuple[Sequence, list[int]]]:
        """After :meth:`wait`: tokens that need no sampling, of sequences that would sample them next."""
        for seq, constraint in list(self._open.items()):
            at_end = seq.num_computed + 1 == seq.num_tokens and not seq.in_flight
            if constraint.forced and at_end and seq.state is State.RUNNING:
                yield seq, constraint.take_forced()

    def wait(self) -> Iterator[tuple[Sequence, Failure]]:
        """For masks that are about to come. Which sequences cannot go on, and why."""
        if not self._open:
            return
        assert self._constraints is not None
        self._constraints.receive()
        self.tell()
        self._constraints.wait([c for seq, c in self._open.items() if seq.state is State.RUNNING])
        failed = set(self._constraints.failed())
        for seq, constraint in list(self._open.items()) if failed else ():
            if constraint in failed and seq.state is not State.FINISHED:
                kind = "internal" if constraint.lost else "invalid"
                yield seq, Failure(kind, f"{_CANNOT}: {constraint.error}")

    def refused(self, seq: Sequence, token: int) -> Failure | None:
        """Of a token that was sampled: one that the grammar does not permit is sampled where nothing can be."""
        if seq.constraint is None or seq.constraint.permits(token):
            return None
        return Failure("invalid", f"{_CANNOT}: {NONE_LEFT}")

    def close(self) -> None:
        if self._constraints is not None:
            self._constraints.shut()
