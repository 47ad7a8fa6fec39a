"""The life of one stream: placed, sent to its nodes, joined by output index, and begun again where nodes fail.

A stream is a client's request on the router, one for each choice of it. It is driven by the links (outputs, losses), by
the registry (a node appeared) and by timers. No I/O of its own and no real time, so that every order of events can be
tested. It calls its ``sink`` for each new token exactly once and in order, and for its end exactly once, whatever
raises meanwhile.

What a pair of nodes says of one try at it is joined by :mod:`pd_serve.router.attempt`.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import secrets
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pd_serve.api.errors import APIError
from pd_serve.config import RouterConfig
from pd_serve.router.attempt import Attempt, Disagreement
from pd_serve.router.groups import Group
from pd_serve.router.line import Clock, Timer
from pd_serve.router.nodes import Node
from pd_serve.router.policy import Nowhere, Placement, Terms, place, reader
from pd_serve.router.spans import RequestSpan
from pd_serve.wire import link
from pd_serve.wire.chunks import CHUNK_TOKENS, chain
from pd_serve.wire.chunks import start as chain_start

log = logging.getLogger(__name__)

_LOCAL_AFTER = 2  # failed transfers, after which the decode node computes the prompt itself
_UNSENT_S = 0.1  # pause after an attempt that could not be written
_PROVEN_TOKENS = 16  # a decode node that made so many works
_SPREAD = 0.5  # Retry-After is up to so much longer: clients that were refused together come back apart


class Sink(Protocol):
    @property
    def started(self) -> bool:
        """The client has been sent something: an error status is no longer possible."""

    def received(self, output: link.Output, now_s: float) -> None:
        """New tokens alone; with ``finish`` the last."""

    def failed(self, error: APIError) -> None: ...


@dataclass
class Shared:
    """What all streams of a router share."""

    settings: RouterConfig
    clock: Clock
    # (event, kind): attempts, retries by reason, aborts; see metrics.
    count: Callable[[str, str], None]
    draining: bool = False
    active: set[Stream] = field(default_factory=set)
    # Attempt ids are keys of leases on nodes that serve several routers.
    prefix: str = field(default_factory=lambda: secrets.token_hex(4))
    numbers: itertools.count[int] = field(default_factory=itertools.count)


class Stream:
    def __init__(
        self,
        shared: Shared,
        group: Group,
        prompt: list[int],
        sampling: link.SamplingParams,
        sink: Sink,
        name: str,
        *,
        priority: int = 0,
        salt: bytes = b"",
        span: RequestSpan | None = None,
    ) -> None:
        """``name``: the request's id (and choice), for logs and as the head of attempt ids. ``priority``: a lower one
        is served before a higher one. ``salt``: cached prefixes are shared with streams of the same one only. ``span``:
        of the request, where it is traced."""
        self._shared = shared
        self._group = group
        self._sink = sink
        self._name = name
        self._logged = {"request_id": name}
        self._prompt = prompt
        # Of a prompt that is worth finding again: what nodes that have its beginning are found by.
        named = len(prompt) >= CHUNK_TOKENS
        self._chain = chain(group.info.fingerprint, _int32(prompt), chain_start(salt)) if named else []
        self._salt = salt
        self._span = span
        self._sampling = sampling
        self._priority = max(-1000, min(1000, priority))
        self.outputs: list[int] = []
        self.num_cached = 0
        self.prompt_logprobs: list[link.TokenLogprob | None] | None = None
        self.done = False
        self.created_s = self.last_progress_s = shared.clock.now_s()
        self.submitted_s: float | None = None  # when nodes were first asked
        self._ended = False  # the sink has been told of the end
        self._attempt: Attempt | None = None
        self._failures = 0
        self._failed_transfers = 0
        self._avoid: dict[str, int] = {}
        self._refused: set[str] = set()
        self._refusal = link.Failure("refused", "all nodes are busy")
        self._timer: Timer | None = None
        self._waits_for_node = False
        self._lined_up = False  # it asks because it was its turn among the streams that were refused

    def start(self) -> None:
        self.last_progress_s = self._shared.clock.now_s()
        self._shared.active.add(self)
        self._dispatch()

    def stop(self, reason: str) -> None:
        """Ends it from this side (stop string found, client gone): nodes are told, the sink is not called again."""
        self._ended = True
        if not self.done:
            if self._attempt is not None:
                self._shared.count("aborts", reason)
                self._attempt.noted("aborted", reason=reason)
            self._close()

    def fail(self, error: APIError) -> None:
        if not self.done:
            self._close()
            self._tell_end(error)

    def broken(self, what: str) -> None:
        """To be called while an exception is handled: a mistake of ours ends this stream and nothing else."""
        log.exception("%s: the router failed to handle %s", self._name, what, extra=self._logged)
        self._close()
        self._tell_end(APIError(500, "internal error of the router: see its log", code="internal"))

    def check_time(self, now_s: float) -> None:
        """Called every second or so: a stream without progress does not hang for ever, whatever it waits for."""
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

    def where(self) -> dict[str, str | int]:
        """What operators may see of it: where it runs and how far it is, nothing of what it says."""
        attempt, made = self._attempt, len(self.outputs)
        phase = "waiting"
        if attempt is not None:
            base = attempt.base
            pair = attempt.source_id and attempt.decode is not None and not attempt.local
            phase = "prefill" if made == base else "transfer" if pair and not attempt.arrived else "decode"
        return {
            "id": self._name,
            "model": self._group.info.name,
            "phase": phase,
            "prefill": "" if attempt is None or attempt.local else attempt.source_id,
            "decode": "" if attempt is None or attempt.decode is None else attempt.decode.id,
            "prompt_tokens": len(self._prompt),
            "tokens": made,
            "max_tokens": self._sampling.max_tokens,
            "failures": self._failures,
        }

    # --- placing ------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        if self.done or self._attempt is not None:
            return
        try:
            self._place()
        except Exception:
            self.broken("its placement")  # timers, links and other streams call this

    def _place(self) -> None:
        placement = place(
            self._group.sources,
            self._group.targets,
            self._terms(begun=self._sink.started),
            last_token=self._sampling.max_tokens - len(self.outputs) == 1,
            local=self._failed_transfers >= _LOCAL_AFTER,
        )
        match placement:
            case Nowhere.NO_NODES:
                self._wait_for_node()
            case Nowhere.REFUSED:
                self._all_refused()
            case Placement():
                self._stop_waiting()
                if not self._too_late(placement):
                    self._submit(placement)

    def _terms(self, *, begun: bool) -> Terms:
        group = self._group
        return Terms(
            prompt_tokens=len(self._prompt) + len(self.outputs),
            total_tokens=len(self._prompt) + self._sampling.max_tokens,
            avoid=self._avoid,
            refused=self._refused,
            unfit=group.unfit().keys(),
            unwell=group.troubles(due=False),
            begun=begun,
            turn=group.turn(),
            chain=self._chain,
        )

    def _submit(self, placement: Placement) -> None:
        shared, made = self._shared, len(self.outputs)
        prefill = self._group.prefill[placement.prefill] if placement.prefill is not None else None
        decode = self._group.decode[placement.decode] if placement.decode is not None else None
        attempt_id = f"{self._name[:48]}~{shared.prefix}{next(shared.numbers):x}"
        attempt = self._attempt = Attempt(attempt_id, self, made, prefill, decode)
        attempt.cached = placement.cached
        if self._span is not None:
            attempt.span = self._span.attempt(attempt, len(self._prompt))
        if self.submitted_s is None:
            self.submitted_s = shared.clock.now_s()
        if prefill is not None:
            self._group.sources.chosen(prefill.id)
        if decode is not None:
            self._group.targets.chosen(decode.id)
        both = prefill is not None and decode is not None
        shared.count("attempts", "pair" if both else "decode" if decode is not None else "prefill")
        # The decode node first: it has claimed the key by the time the first chunk is ready.
        if decode is not None:
            if prefill is not None:
                prefill.expect(attempt)
                attempt.postponed = placement.ask
            self._submit_decode(attempt, decode)
        if attempt is self._attempt and prefill is not None and not attempt.postponed:
            self._submit_prefill(attempt, prefill)

    def _submit_decode(self, attempt: Attempt, node: Node) -> None:
        attempt.decode = node
        source = attempt.prefill.source if attempt.prefill is not None else None
        if attempt.prefill is not None:
            self._group.breakers.tried((attempt.prefill.id, node.id))
        self._hand(attempt, node, source=source)

    def _submit_prefill(self, attempt: Attempt, node: Node) -> None:
        attempt.postponed = False
        self._hand(attempt, node, handoff=attempt.decode is not None)

    def _hand(self, attempt: Attempt, node: Node, *, handoff: bool = False, source: link.Source | None = None) -> None:
        sampling = self._sampling
        if sampling.prompt_logprobs >= 0 and attempt.base:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)  # they came with the first token
        submit = link.Submit(
            attempt.id,
            _int32(self._prompt + self.outputs[: attempt.base]),
            attempt.base,
            sampling,
            handoff=handoff,
            source=source,
            age_s=self._shared.clock.now_s() - self.created_s,
            priority=self._priority,
            salt=self._salt,
            trace="" if attempt.span is None else attempt.span.traceparent,
        )
        self._group.breakers.tried(node.id)
        cached = attempt.cached if node is attempt.prefill else 0
        if not node.submit(attempt, submit, cached) and attempt is self._attempt:
            # A link that is closing takes everything, and tells us when it ends. This is another matter.
            attempt.failed("unsent", f"{node.title} could not be written to")
            self._end_attempt()
            self._avoid[node.id] = self._avoid.get(node.id, 0) + 1
            self._again("unsent", f"{node.title} could not be written to", pause_s=_UNSENT_S)

    def _too_late(self, placement: Placement) -> bool:
        """Ends a stream whose first token is expected after the objective: refusing it at once costs others nothing."""
        objective_s = self._shared.settings.ttft_objective_ms / 1000
        if not objective_s or self._sink.started:
            return False
        expected_s = self._group.ttft_s(placement, len(self._prompt)) + self._shared.clock.now_s() - self.created_s
        if expected_s <= objective_s:
            return False
        self._shared.count("aborts", "ttft_objective")
        wait_s = math.ceil(max(expected_s - objective_s, 1.0) * random.uniform(1.0, 1.0 + _SPREAD))
        message = (
            f"the first token is expected after {expected_s:.1f} s, and {objective_s:g} s are promised: try again in "
            f"{wait_s} s"
        )
        self.fail(APIError(429, message, code="overloaded", retry_after_s=wait_s))
        return True

    def _wait_for_node(self) -> None:
        if self._waits_for_node:
            return
        self._stop_waiting()
        self._waits_for_node = True
        wait_s = 0.0 if self._shared.draining else self._shared.settings.node_wait_s
        self._group.waiting[self] = self.created_s, self._dispatch
        self._timer = self._shared.clock.call_later(wait_s, self._no_node_came)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waits_for_node = False
        self._group.waiting.pop(self, None)
        self._group.line.leave(self)

    def _no_node_came(self) -> None:
        self._timer = None
        name, total = self._group.info.name, len(self._prompt) + self._sampling.max_tokens
        if any(not node.load.draining for node in self._group.decode.values()):
            what = f"no node that serves the model '{name}' now has room for {total} tokens: ask for less"
        else:
            what = f"no decode node serves the model '{name}' now: start one"
        self.fail(
            APIError(
                503,
                f"{what}, or try again later",
                code="no_nodes",
                retry_after_s=self._shared.settings.node_wait_s,
            )
        )

    def _all_refused(self) -> None:
        self._stop_waiting()
        self._refused.clear()
        if self._sink.started:
            # The client has a status and a part of the text: waiting is all that is left.
            self._lined_up = False
            pause_s = self._refusal.retry_after_s or 1.0
            self._group.line.join(self, self.created_s, self._my_turn, self._shared.clock, pause_s)
            return
        retry_after_s = self._retry_after_s()
        message = f"all nodes are busy ({self._refusal.message}): try again in {retry_after_s} s"
        self.fail(APIError(429, message, code="overloaded", retry_after_s=retry_after_s))

    def _retry_after_s(self) -> int:
        """When the nodes expect to have room, and not before the one that refused last does."""
        waits = [view.queue_wait_s for _, view in self._group.targets.some(self._group.turn()) if not view.draining]
        soonest_s = max(min(waits, default=0.0), self._refusal.retry_after_s, 1.0)
        return math.ceil(soonest_s * random.uniform(1.0, 1.0 + _SPREAD))

    def _my_turn(self) -> None:
        self._lined_up = True
        self._dispatch()

    # --- what nodes say -----------------------------------------------------------------------------

    def on_output(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        if attempt is not self._attempt or (node is not attempt.prefill and node is not attempt.decode):
            return
        if output.failure is not None:
            self._on_failure(attempt, node, output.failure)
            return
        absurd = attempt.absurd(output, self._sampling.max_tokens, self._group.info.vocab_size)
        if absurd is not None:
            self._on_fault(attempt, node, link.Failure("internal", f"it sent {absurd}"))
            return
        self.last_progress_s = now_s
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if node is attempt.decode:
            self._on_event(attempt, node, output, now_s)
        if attempt is self._attempt and (output.tokens or output.finish is not None):
            self._join(attempt, node, output, now_s)
        if attempt is self._attempt:
            if attempt.prefill_is_done(len(self.outputs)):
                self._detach_prefill(attempt, abort=False)
            attempt.settle(len(self.outputs))

    def on_next(self, output: link.Output, now_s: float) -> bool:
        """One token of the decode node, when nothing else is left of the attempt: there is nothing to join then, and
        nothing to check but its place. False where it is not the next one, or breakers have to hear of it."""
        outputs = self.outputs
        if output.index != len(outputs) or output.index >= self._sampling.max_tokens or self._group.breakers.states:
            return False
        self.last_progress_s = now_s
        outputs += output.tokens
        self._sink.received(output, now_s)
        return True

    def _on_event(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        """A decode node's word that is no refusal: it has accepted, whatever else it says."""
        if output.event == "local":
            attempt.local = True
            attempt.noted("computed by the decode node")
        elif output.event == "arrived":
            attempt.arrived = True
            attempt.noted("KV arrived")
            if attempt.prefill is not None and self._group.breakers:
                self._group.breakers.succeeded((attempt.prefill.id, node.id))
        if not attempt.accepted:
            held = attempt.accept()
            attempt.noted("accepted")
            self._refused.clear()
            if self._lined_up:
                self._lined_up = False
                self._group.line.advance()
            if attempt.postponed and attempt.prefill is not None and not attempt.local:
                self._submit_prefill(attempt, attempt.prefill)
            for waiting in held:
                if attempt is self._attempt and attempt.prefill is not None:
                    self._join(attempt, attempt.prefill, waiting, now_s)
        if attempt.local and attempt is self._attempt:
            self._detach_prefill(attempt, abort=True)

    def _join(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        """Takes an output, and those of the decode node that waited for it."""
        self._take(attempt, node, output, now_s)
        while attempt is self._attempt and attempt.decode is not None:
            early = attempt.next_early(len(self.outputs))
            if early is None:
                return
            self._take(attempt, attempt.decode, early, now_s)

    def _take(self, attempt: Attempt, node: Node, output: link.Output, now_s: float) -> None:
        try:
            news = attempt.news(node, output, self.outputs)
        except Disagreement:
            self._disagreement(attempt)
            return
        if news is None:
            return
        if not self.outputs:
            self.num_cached = news.num_cached
        if self._chain and len(self.outputs) == attempt.base:
            self._learn(attempt, node, news.num_cached)
        self.outputs.extend(news.tokens)
        if self._group.breakers:
            made = len(self.outputs) - attempt.base
            if node is attempt.prefill or news.finish is not None or made >= _PROVEN_TOKENS:
                self._group.breakers.succeeded(node.id)
        if news.finish is not None:
            node.release(attempt, abort=False)  # it has ended there; the other node is told
            self._close()
        self._deliver(news, now_s)

    def _learn(self, attempt: Attempt, node: Node, num_cached: int) -> None:
        """A node made its first token: the prompt is computed, and whoever did it has said what it had of it before."""
        if attempt.prefill is not None and not attempt.local:
            node = attempt.prefill  # also where it is the decode node that tells of the first token
        self._group.computed(node, self._chain, num_cached)
        if attempt.decode is not None and attempt.decode is not node:
            self._group.computed(attempt.decode, self._chain, None)  # it is about to have it

    def _disagreement(self, attempt: Attempt) -> None:
        """Both nodes made the same token and it is not the same (kernels differ): the client's copy counts."""
        log.info(
            "%s: two nodes disagree at a near tie; going on after the token that was sent",
            attempt.id,
            extra=self._logged,
        )
        self._shared.count("retries", "disagreement")
        attempt.noted("disagreement")
        self._end_attempt()
        self._dispatch()

    def _on_failure(self, attempt: Attempt, node: Node, failure: link.Failure) -> None:
        node.release(attempt, abort=False)  # it has ended its part; an abort would name an id that it no longer knows
        if node is attempt.prefill and (attempt.local or attempt.prefill_is_done(len(self.outputs))):
            attempt.prefill = None
        elif failure.kind == "refused":
            self._on_refusal(attempt, node, failure)
        else:
            self._on_fault(attempt, node, failure)

    def _on_refusal(self, attempt: Attempt, node: Node, failure: link.Failure) -> None:
        self._shared.count("retries", "refused")
        attempt.noted("refused", node=node.id, why=failure.message)
        self._refused.add(node.id)
        self._refusal = failure
        if node is attempt.decode and attempt.prefill is not None:
            source = self._group.sources.get(attempt.prefill.id)
            # What is being computed is worth asking every node for.
            terms = self._terms(begun=self._sink.started or not attempt.postponed)
            other = reader(source, self._group.targets, terms) if source is not None else None
            if other is not None:
                attempt.accepted = False
                self._submit_decode(attempt, self._group.decode[other])
                return
        self._end_attempt()
        self._dispatch()

    def _on_fault(self, attempt: Attempt, node: Node, failure: link.Failure) -> None:
        attempt.failed(failure.kind, f"{_part(attempt, node)} node {node.id}: {failure.message}")
        self._end_attempt()
        log.warning("%s: %s failed (%s): %s", attempt.id, node.title, failure.kind, failure.message, extra=self._logged)
        if failure.kind == "invalid":
            self.fail(APIError(400, failure.message, code="invalid_value"))
            return
        transfer = failure.kind == "transfer"
        self._failed_transfers += transfer
        prefill, decode = attempt.prefill, attempt.decode
        both = (prefill.id, decode.id) if prefill is not None and decode is not None else None
        if self._group.breakers.failed(both if transfer and both else node.id, failure.message):
            self._shared.count("trips", "pair" if transfer and both else "node")
        for other in (prefill, decode) if transfer else (node,):
            if other is not None:
                self._avoid[other.id] = self._avoid.get(other.id, 0) + 1
        self._again(failure.kind, f"{_part(attempt, node)} node: {failure.message}")

    def on_lost(self, attempt: Attempt, node: Node, why: str) -> None:
        """The link to ``node`` has ended, and with it the attempt, unless the node had done its part."""
        if attempt is not self._attempt:
            return
        if node is attempt.prefill and attempt.prefill_is_done(len(self.outputs)):
            attempt.prefill = None
            return
        attempt.failed("lost", f"{_part(attempt, node)} node {node.id}: {why}")
        self._end_attempt()
        self._again("lost", f"{_part(attempt, node)} node lost: {why}")

    def _again(self, reason: str, what: str, pause_s: float = 0.0) -> None:
        self._failures += 1
        self._shared.count("retries", reason)
        if self._failures >= self._shared.settings.max_attempts:
            self.fail(APIError(502, f"gave up after {self._failures} attempts; the last: {what}", code="nodes_failed"))
            return
        log.info("%s: %s; resuming after %d tokens", self._name, what, len(self.outputs), extra=self._logged)
        if pause_s:
            self._timer = self._shared.clock.call_later(pause_s, self._dispatch)
        else:
            self._dispatch()

    # --- ends ---------------------------------------------------------------------------------------

    def _deliver(self, news: link.Output, now_s: float) -> None:
        try:
            self._sink.received(news, now_s)
        except Exception:
            self._ended = False  # a sink that raises has not told its client
            self.broken("tokens")
        else:
            self._ended = self._ended or news.finish is not None

    def _tell_end(self, error: APIError) -> None:
        """Once, even where the sink raises."""
        if self._ended:
            return
        self._ended = True
        try:
            self._sink.failed(error)
        except Exception:
            log.exception("%s: the client could not be told of the end (%s)", self._name, error)

    def _detach_prefill(self, attempt: Attempt, *, abort: bool) -> None:
        node, attempt.prefill = attempt.prefill, None
        if node is not None:
            node.release(attempt, abort=abort)

    def _end_attempt(self) -> None:
        """Late frames of it find nobody, and both nodes give back what it holds. Unknown ids are ignored there."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if attempt.span is not None:
            attempt.span.end(len(self.outputs) - attempt.base)
        for node in (attempt.prefill, attempt.decode):
            if node is not None:
                node.release(attempt, abort=True)

    def _close(self) -> None:
        self.done = True
        self._stop_waiting()
        self._end_attempt()
        self._shared.active.discard(self)


def _part(attempt: Attempt, node: Node) -> str:
    return "prefill" if node is attempt.prefill else "decode"


def _int32(tokens: list[int]) -> bytes:
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
