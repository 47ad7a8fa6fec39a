"""One try at a stream on one pair of nodes: where it stands, and what its two nodes say joined by output index.

The decode node answers whether it has room ("accepted"); until it has, the prefill node's first token waits here, so
that a refusal can still be a status. A stream makes attempts one after the other, and has at most one.
"""

from __future__ import annotations

from typing import Protocol

from pd_serve.router.nodes import Node
from pd_serve.router.spans import AttemptSpan
from pd_serve.wire import link


class Disagreement(Exception):
    """Both nodes made the same token and it is not the same."""


class Owner(Protocol):
    """The stream."""

    def on_output(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None: ...

    def on_next(self, output: link.Output, now_s: float) -> bool:
        """A steady attempt's one token and nothing else; False where it is to be looked at as others are."""

    def on_lost(self, attempt: Attempt, node: Node, why: str) -> None: ...

    def broken(self, what: str) -> None:
        """To be called while an exception is handled."""


class Attempt:
    """``id``: the lease's key. ``prefill``, ``decode``: its nodes, while they have a part in it."""

    def __init__(self, id: str, owner: Owner, base: int, prefill: Node | None, decode: Node | None) -> None:
        self.id = id
        self.base = base  # output index of the first token that this attempt makes
        self.prefill = prefill
        self.decode = decode
        self.source_id = prefill.id if prefill is not None else ""  # stays when the prefill node has done its part
        self.cached = 0  # prompt tokens that the prefill node is thought to have
        self.postponed = False  # the prefill node gets it when the decode node has accepted
        self.accepted = False  # the decode node has room
        self.arrived = False  # the KV is on the decode node
        self.local = False  # the decode node computes the prompt itself
        self.steady = False  # nothing is left of it but the decode node's next tokens
        self.span: AttemptSpan | None = None  # where its request is traced
        self._owner = owner
        self._held: list[link.Output] = []  # of the prefill node, before the decode node accepted
        self._early: list[link.Output] = []  # of the decode node, before the prefill node's first token came

    # --- called by nodes (see nodes.Attempt) ----------------------------------------------------------

    def output(self, node: Node, output: link.Output, now_s: float) -> None:
        try:
            # What nearly all outputs are: one token and nothing else.
            if (
                self.steady
                and output.finish is None
                and output.event is None
                and output.failure is None
                and output.logprobs is None
                and output.prompt_logprobs is None
                and len(output.tokens) == 1
                and node is self.decode
                and self._owner.on_next(output, now_s)
            ):
                return
            self._owner.on_output(self, node, output, now_s)
        except Exception:
            # One broken request must not end the link, and with it all others.
            self._owner.broken("an output")

    def lost(self, node: Node, why: str) -> None:
        try:
            self._owner.on_lost(self, node, why)
        except Exception:
            self._owner.broken("a lost node")  # the other attempts of the node are still to be told

    # --- its trace ----------------------------------------------------------------------------------

    def noted(self, what: str, **more: str) -> None:
        if self.span is not None:
            self.span.event(what, **more)

    def failed(self, kind: str, why: str) -> None:
        if self.span is not None:
            self.span.fail(kind, why)

    # --- called by its stream -------------------------------------------------------------------------

    def prefill_is_done(self, count: int) -> bool:
        """``count`` output tokens are known: nothing that the prefill node still says or meets with matters."""
        return self.arrived and count > self.base

    def settle(self, count: int) -> None:
        """``count`` output tokens are known: whether anything else than tokens of the decode node can matter."""
        self.steady = self.prefill is None and self.accepted and count > self.base and not self._early

    def absurd(self, output: link.Output, max_tokens: int, vocab_size: int) -> str | None:
        """What no sound node says: it would break the join, or the client's text."""
        tokens = output.tokens
        if not (tokens or output.finish is not None):
            return None
        if not self.base <= output.index <= max_tokens or output.index + len(tokens) > max_tokens:
            return f"{len(tokens)} tokens at index {output.index}, of {self.base} to {max_tokens} that were asked for"
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            return "token ids beyond the vocabulary"
        if output.logprobs is not None and len(output.logprobs) != len(tokens):
            return f"{len(output.logprobs)} log-probabilities for {len(tokens)} tokens"
        if output.finish not in (None, "stop", "length"):
            return f"the end '{output.finish[:40]}'"
        if len(self._early) + len(self._held) > max_tokens:
            return "the same tokens again and again"
        return None

    def accept(self) -> list[link.Output]:
        """The decode node has room: what the prefill node said before that, and was held back."""
        self.accepted = True
        held, self._held = self._held, []
        return held

    def news(self, node: Node, output: link.Output, known: list[int]) -> link.Output | None:
        """``output`` without the output tokens that are ``known``; None where it has to wait, or adds nothing.

        Raises Disagreement.
        """
        if node is self.prefill and self.decode is not None and not self.accepted and output.finish is None:
            self._held.append(output)
            return None
        tokens = output.tokens
        again = len(known) - output.index
        if again < 0:
            self._early.append(output)
            return None
        if again > 0:
            if tokens[:again] != known[output.index : output.index + len(tokens)]:
                raise Disagreement
            tokens = output.tokens = tokens[again:]
            output.index = len(known)
            output.logprobs = output.logprobs[again:] if output.logprobs is not None else None
        if node is self.decode and len(known) + len(tokens) > self.base + 1:
            self.arrived = True  # it could not have made more than the first token otherwise
        return output if tokens or output.finish is not None else None

    def next_early(self, count: int) -> link.Output | None:
        """An output of the decode node that came too early, and no longer is: ``count`` output tokens are known."""
        if not self._early:
            return None
        place = next((p for p, early in enumerate(self._early) if early.index <= count), None)
        return self._early.pop(place) if place is not None else None
