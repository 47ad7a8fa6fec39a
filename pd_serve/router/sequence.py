"""The life of one sequence: placed, sent to its nodes, joined by output index, and begun again where nodes fail.

Created by a generation for each choice; driven by the links (outputs, losses), by the registry (a node
appeared) and by timers. No I/O of its own and no real time, so that every order of events can be tested. It calls its
``sink`` for each new token exactly once and in order, and for its end exactly once.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pd_serve.api.errors import APIError
from pd_serve.config import RouterConfig
from pd_serve.router.clock import Clock, Timer
from pd_serve.router.nodes import Group, Node
from pd_serve.router.policy import Nowhere, Placement, place
from pd_serve.wire import link

log = logging.getLogger(__name__)

_RETRY_S = (0.2, 2.0)  # bounds of the pause before a stream that has begun is offered to full nodes again
_LOCAL_AFTER = 2  # failed transfers, after which the decode node computes the prompt itself


class Sink(Protocol):
    @property
    def started(self) -> bool:
        """The client has been sent something: an error status is no longer possible."""

    def received(
        self,
        tokens: list[int],
        logprobs: list[link.TokenLogprob] | None,
        finish: str | None,
        stop_token: int | None,
        now_s: float,
    ) -> None:
        """New tokens; with ``finish`` the last."""

    def failed(self, error: APIError) -> None: ...


@dataclass
class Shared:
    """What all sequences of a router share."""

    settings: RouterConfig
    clock: Clock
    # (event, kind): attempts, retries by reason, aborts; see metrics.
    count: Callable[[str, str], None]
    draining: bool = False
    active: set[Sequence] = field(default_factory=set)
    # Attempt ids are keys of leases on nodes that serve several routers.
    prefix: str = field(default_factory=lambda: secrets.token_hex(4))
    numbers: itertools.count[int] = field(default_factory=itertools.count)


class Attempt:
    """One try at a sequence on one pair of nodes; its id is the lease's key."""

    __slots__ = ("arrived", "base", "decode", "early", "id", "local", "prefill", "sequence")

    def __init__(self, id: str, sequence: Sequence, base: int, prefill: Node | None, decode: Node | None) -> None:
        self.id = id
        self.sequence = sequence
        self.base = base  # output index of the first token that this attempt makes
        self.prefill = prefill  # while it has a part in the attempt
        self.decode = decode
        self.arrived = False  # the KV is on the decode node
        self.local = False  # the decode node computes the prompt itself
        self.early: list[link.Output] = []  # of the decode node, before the prefill node's first token came

    def output(self, node: Node, output: link.Output, now_s: float) -> None:
        try:
            self.sequence.on_output(self, node, output, now_s)
        except Exception:
            # One broken request must not end the link, and with it all others.
            log.exception("%s: the router failed to handle an output", self.id)
            self.sequence.fail(APIError(500, "internal error of the router: see its log", code="internal"))

    def lost(self, node: Node, why: str) -> None:
        self.sequence.on_lost(self, node, why)


class Sequence:
    def __init__(
        self, shared: Shared, group: Group, prompt: list[int], sampling: link.SamplingParams, sink: Sink, name: str
    ) -> None:
        """``name``: the request's id (and choice), for logs and as the head of attempt ids."""
        self._shared = shared
        self._group = group
        self._sink = sink
        self._name = name
        self._prompt = prompt
        self._sampling = sampling
        self.outputs: list[int] = []
        self.num_cached = 0
        self.prompt_logprobs: list[link.TokenLogprob | None] | None = None
        self.done = False
        self.last_progress_s = shared.clock.now_s()
        self._attempt: Attempt | None = None
        self._failures = 0
        self._failed_transfers = 0
        self._avoid: dict[str, int] = {}
        self._refused: set[str] = set()
        self._refusal = link.Failure("refused", "all nodes are busy")
        self._timer: Timer | None = None
        self._waits_for_node = False

    def start(self) -> None:
        self._shared.active.add(self)
        self._dispatch()

    def stop(self, reason: str) -> None:
        """Ends it from this side (stop string found, client gone): nodes are told, the sink is not called again."""
        if not self.done:
            if self._attempt is not None:
                self._shared.count("aborts", reason)
            self._close()

    def fail(self, error: APIError) -> None:
        if not self.done:
            self._close()
            self._sink.failed(error)

    def check_time(self, now_s: float) -> None:
        """Called every second or so: a sequence without progress does not hang for ever."""
        limit = self._shared.settings.request_timeout_s
        if not self.done and now_s - self.last_progress_s > limit:
            self._shared.count("aborts", "timeout")
            self.fail(
                APIError(
                    504,
                    f"the request made no progress for {limit:g} s and was ended: try again, or ask for less at once",
                    code="timeout",
                    retry_after_s=1.0,
                )
            )

    # --- placing ------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        if self.done or self._attempt is not None:
            return
        group = self._group
        made = len(self.outputs)
        placement = place(
            [node.view() for node in group.prefill.values()],
            [node.view() for node in group.decode.values()],
            prompt_tokens=len(self._prompt) + made,
            last_token=self._sampling.max_tokens - made == 1,
            local=self._failed_transfers >= _LOCAL_AFTER,
            avoid=self._avoid,
            refused=self._refused,
            turn=group.turn(),
        )
        match placement:
            case Nowhere.NO_NODES:
                self._wait_for_node()
            case Nowhere.REFUSED:
                self._all_refused()
            case Placement():
                self._stop_waiting()
                self._submit(placement)

    def _submit(self, placement: Placement) -> None:
        shared, made = self._shared, len(self.outputs)
        prefill = self._group.prefill[placement.prefill] if placement.prefill is not None else None
        decode = self._group.decode[placement.decode] if placement.decode is not None else None
        attempt_id = f"{self._name[:48]}~{shared.prefix}{next(shared.numbers):x}"
        attempt = self._attempt = Attempt(attempt_id, self, made, prefill, decode)
        sampling = self._sampling
        if sampling.prompt_logprobs >= 0 and made:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)  # they came with the first token
        both = prefill is not None and decode is not None
        tokens = _int32(self._prompt + self.outputs)
        shared.count("attempts", "pair" if both else "decode" if decode is not None else "prefill")
        # The decode node first: it has claimed the key by the time the first chunk is ready.
        if decode is not None:
            source = prefill.source if prefill is not None else None
            decode.submit(attempt, link.Submit(attempt.id, tokens, made, sampling, source=source))
        if prefill is not None:
            prefill.submit(attempt, link.Submit(attempt.id, tokens, made, sampling, handoff=both))

    def _wait_for_node(self) -> None:
        if self._waits_for_node:
            return
        self._waits_for_node = True
        wait_s = 0.0 if self._shared.draining else self._shared.settings.node_wait_s
        self._group.waiting[self] = self._dispatch
        self._timer = self._shared.clock.call_later(wait_s, self._no_node_came)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waits_for_node = False
        self._group.waiting.pop(self, None)

    def _no_node_came(self) -> None:
        self._timer = None
        self.fail(
            APIError(
                503,
                f"no decode node serves the model '{self._group.info.name}' now: start one, or try again later",
                code="no_nodes",
                retry_after_s=self._shared.settings.node_wait_s,
            )
        )

    def _all_refused(self) -> None:
        self._stop_waiting()
        retry_after_s = self._refusal.retry_after_s or 1.0
        self._refused.clear()
        if self._sink.started:
            # The client has a status and a part of the text: waiting is all that is left.
            low, high = _RETRY_S
            self._timer = self._shared.clock.call_later(min(max(retry_after_s, low), high), self._dispatch)
            return
        message = f"all nodes are busy ({self._refusal.message}): try again in {max(1, round(retry_after_s))} s"
        self.fail(APIError(429, message, code="overloaded", retry_after_s=retry_after_s))

    # --- what nodes say -----------------------------------------------------------------------------

    def on_output(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        if attempt is not self._attempt:
            return
        if output.failure is not None:
            self._on_failure(attempt, node, output.failure)
            return
        if output.event is not None:
            if output.event == "local" and node is attempt.decode:
                attempt.local = True
                self._detach_prefill(attempt, abort=True)
            elif output.event == "arrived":
                attempt.arrived = True
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.tokens or output.finish is not None:
            self._take(attempt, node, output, now_s)
        if attempt.prefill is not None and attempt.arrived and len(self.outputs) > attempt.base:
            self._detach_prefill(attempt, abort=False)

    def _take(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        """Joins by output index: what is known already is compared, what is too early waits."""
        tokens, logprobs = output.tokens, output.logprobs
        known = len(self.outputs) - output.index
        if known < 0:
            attempt.early.append(output)
            return
        if known > 0:
            if tokens[:known] != self.outputs[output.index : output.index + len(tokens)]:
                self._disagreement(attempt)
                return
            tokens = tokens[known:]
            logprobs = logprobs[known:] if logprobs is not None else None
        if node is attempt.decode and len(self.outputs) + len(tokens) > attempt.base + 1:
            attempt.arrived = True  # it could not have made more than the first token otherwise
        if not tokens and output.finish is None:
            return
        if not self.outputs:
            self.num_cached = output.num_cached
        self.outputs.extend(tokens)
        self.last_progress_s = now_s
        if output.finish is not None:
            node.attempts.pop(attempt.id, None)  # it has ended there; the other node is told
            self._close()
        self._sink.received(tokens, logprobs, output.finish, output.stop_token, now_s)
        while attempt.early and attempt is self._attempt:
            early = attempt.early
            attempt.early = []
            before = len(self.outputs)
            for waiting in early:
                if attempt is self._attempt:
                    self._take(attempt, node if attempt.decode is None else attempt.decode, waiting, now_s)
            if len(self.outputs) == before:
                return

    def _disagreement(self, attempt: Attempt) -> None:
        """Both nodes made the same token and it is not the same (kernels differ): the client's copy counts."""
        log.info("%s: two nodes disagree at a near tie; going on after the token that was sent", attempt.id)
        self._shared.count("retries", "disagreement")
        self._end_attempt()
        self._dispatch()

    def _on_failure(self, attempt: Attempt, node: Node, failure: link.Failure) -> None:
        # The node has ended its part; an abort to it would name an id that it no longer knows.
        node.attempts.pop(attempt.id, None)
        if node is attempt.prefill and (attempt.local or (attempt.arrived and len(self.outputs) > attempt.base)):
            attempt.prefill = None
            return
        self._end_attempt()
        if failure.kind == "refused":
            self._shared.count("retries", "refused")
            self._refused.add(node.id)
            self._refusal = failure
            self._dispatch()
            return
        log.warning("%s: %s node %s failed (%s): %s", attempt.id, node.role, node.id, failure.kind, failure.message)
        if failure.kind == "invalid":
            self.fail(APIError(400, failure.message, code="invalid_value"))
            return
        self._failed_transfers += failure.kind == "transfer"
        for other in (attempt.prefill, attempt.decode) if failure.kind == "transfer" else (node,):
            if other is not None:
                self._avoid[other.id] = self._avoid.get(other.id, 0) + 1
        self._again(failure.kind, f"{node.role} node: {failure.message}")

    def on_lost(self, attempt: Attempt, node: Node, why: str) -> None:
        """The link to ``node`` has ended, and with it the attempt, unless the node had done its part."""
        if attempt is not self._attempt:
            return
        if node is attempt.prefill and attempt.arrived and len(self.outputs) > attempt.base:
            attempt.prefill = None
            return
        self._end_attempt()
        self._again("lost", f"{node.role} node lost: {why}")

    def _again(self, reason: str, what: str) -> None:
        self._failures += 1
        self._shared.count("retries", reason)
        if self._failures >= self._shared.settings.max_attempts:
            self.fail(APIError(502, f"gave up after {self._failures} attempts; the last: {what}", code="nodes_failed"))
            return
        log.info("%s: %s; resuming after %d tokens", self._name, what, len(self.outputs))
        self._dispatch()

    # --- ends ---------------------------------------------------------------------------------------

    def _detach_prefill(self, attempt: Attempt, *, abort: bool) -> None:
        node, attempt.prefill = attempt.prefill, None
        if node is not None and node.attempts.pop(attempt.id, None) is not None and abort:
            node.abort(attempt.id)

    def _end_attempt(self) -> None:
        """Late frames of it find nobody, and both nodes give back what it holds. Unknown ids are ignored there."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        for node in (attempt.prefill, attempt.decode):
            if node is not None and node.attempts.pop(attempt.id, None) is not None:
                node.abort(attempt.id)

    def _close(self) -> None:
        self.done = True
        self._stop_waiting()
        self._end_attempt()
        self._shared.active.discard(self)


def _int32(tokens: list[int]) -> bytes:
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
