"""The engine's loop: take messages, plan a step, compute it, say what came out.

One thread, one device. Sleeps in ``poll`` when there is nothing to do. Everything that a client is
owed leaves through ``Output`` messages: every admitted sequence ends in exactly one of a finish reason,
a failure, or an abort asked for by its router.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import zmq
from torch import Tensor

from pd_serve.compute.cpu.sampler import Sampled, Sampler
from pd_serve.compute.step import Step
from pd_serve.engine import checks
from pd_serve.engine.channel import Channel
from pd_serve.engine.plan import Work, build_batch
from pd_serve.engine.presence import Presence
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.scheduler import Scheduler
from pd_serve.engine.sequence import Sequence, State
from pd_serve.engine.sleep import TAGS
from pd_serve.errors import PDServeError
from pd_serve.kv.manager import KVManager
from pd_serve.wire import engine as wire
from pd_serve.wire import link

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
# An engine that is to sleep and has ended its requests waits so long for transfers that still write to its blocks.
TRANSFERS_END_S = 10.0


class Compute(Protocol):
    def execute(self, batch: Step) -> Tensor:
        """Runs the model over a batch: ``[N, vocab]`` float32 logits of ``batch.logits_rows``."""


@dataclass(frozen=True)
class _Computed:
    """What a step made of a part of its plan, before any of it is booked."""

    works: list[Work]
    sampled: Sampled | None  # of those works that sample, in their order
    prompt_logprobs: dict[str, list[link.TokenLogprob | None]]  # by sequence


class Engine:
    def __init__(
        self,
        *,
        kv: KVManager,
        scheduler: Scheduler,
        runner: Compute,
        sampler: Sampler,
        presence: Presence,
        channel: Channel,
        pulse: Pulse,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
    ) -> None:
        self._kv = kv
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._presence = presence
        self._role = presence.role
        self._channel = channel
        self._pulse = pulse
        self._eos = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._seqs: dict[str, Sequence] = {}
        self._outbound: defaultdict[int, list[link.Output]] = defaultdict(list)
        self._submits: dict[int, int] = {}  # by origin: the number of its last submit
        self._stopping = False
        self._draining = False
        self._drained_sent = False
        self._checked_idle = True
        self._reported_idle = True
        self._status_due_s = 0.0
        self._reported_misfits: dict[str, str] = {}
        self._bedtime: wire.Sleep | None = None  # an order that waits for work to end
        self._bedtime_due_s = math.inf  # when it is given up
        self._poller = zmq.Poller()
        self._counters: defaultdict[str, float] = defaultdict(float)

    # --- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until the node says ``Shutdown``."""
        self._poller.register(self._channel.socket, zmq.POLLIN)
        self._poller.register(self._role.fileno(), zmq.POLLIN)
        worked = False
        while not self._stopping:
            # after an empty plan only a message or a transfer event can change anything
            wait_s = 0.0 if worked else max(0.0, self._status_due_s - time.monotonic())
            self._pulse.rest()
            self._poller.poll(math.ceil(wait_s * 1000))
            self._pulse.turn()
            self._receive()
            for seq, output in self._role.events():
                self._emit(seq, output)
                if output.failure is not None:
                    self._seqs.pop(seq.id, None)
            # before a step that may take long: clients wait for the answers, and routers place by the report
            self._flush()
            self._report()
            worked = self._step()
            self._flush()
            self._turn_in()

    def _step(self) -> bool:
        """Computes one step; False when there was nothing to compute."""
        plan = self._scheduler.plan()
        if not plan:
            return False
        self._checked_idle = False
        started_s = time.perf_counter()
        for computed in self._compute(plan):
            self._book(computed)
        self._counters["steps"] += 1
        self._counters["step_seconds"] += time.perf_counter() - started_s
        self._counters["computed_tokens"] += sum(work.num_tokens for work in plan)
        return True

    def _compute(self, plan: list[Work], *, again: bool = False) -> list[_Computed]:
        """Computes a plan. Where that fails its halves are computed apart, so that only those fail that cannot be."""
        try:
            with self._pulse.step(sum(work.num_tokens for work in plan)):
                return [self._execute(plan)]
        except Exception as error:
            self._counters["step_failures"] += 1
            if len(plan) > 1:
                log.warning("a step of %d sequences failed; they are computed apart", len(plan), exc_info=not again)
                half = len(plan) // 2
                return [*self._compute(plan[:half], again=True), *self._compute(plan[half:], again=True)]
            seq = plan[0].seq
            log.error("%s cannot be computed and ends here: %r", seq.id, error, exc_info=not again)
            self._fail(seq, link.Failure("internal", "the node failed to compute this request; see its log"))
            return []

    def _execute(self, plan: list[Work]) -> _Computed:
        """May be done twice: nothing is booked here."""
        batch = build_batch(plan, self._kv.layout.block_size, len(self._kv.layout.groups))
        logits = self._runner.execute(batch)
        samplers = [w.seq for w in plan if w.samples]
        prompt_logprobs: dict[str, list[link.TokenLogprob | None]] = {}
        if any(w.wants_prompt_logprobs for w in plan):
            logits = self._prompt_logprobs(plan, logits, prompt_logprobs)
        sampled = self._sampler.sample(logits, samplers) if samplers else None
        return _Computed(plan, sampled, prompt_logprobs)

    def _book(self, computed: _Computed) -> None:
        """The results of a step reach their sequences, roles and routers."""
        at = 0
        for work in computed.works:
            seq, samples = work.seq, work.samples
            if (found := computed.prompt_logprobs.get(seq.id)) is not None:
                seq.prompt_logprobs = [*(seq.prompt_logprobs or ()), *found]
            self._scheduler.advance(work)
            if not samples:
                self._role.computed(seq, None)
                continue
            assert computed.sampled is not None
            self._token(seq, computed.sampled.tokens[at], computed.sampled.logprobs[at])
            at += 1

    def _prompt_logprobs(
        self, plan: list[Work], logits: Tensor, found: dict[str, list[link.TokenLogprob | None]]
    ) -> Tensor:
        """Puts log-probabilities of prompt tokens into ``found``; returns the rows that are sampled from."""
        keep, row = [], 0
        for work in plan:
            seq = work.seq
            if not work.wants_prompt_logprobs:
                keep += [row] * work.samples
                row += int(work.samples)
                continue
            begin = seq.num_computed
            count = min(work.num_tokens, seq.num_prompt - 1 - begin)  # the last prompt token predicts output
            found[seq.id] = [None] if seq.prompt_logprobs is None else []
            if count > 0:
                targets = seq.tokens[begin + 1 : begin + 1 + count].tolist()
                found[seq.id] += self._sampler.prompt_logprobs(
                    logits[row : row + count], targets, seq.sampling.prompt_logprobs
                )
            row += work.num_tokens
            keep += [row - 1] * work.samples
        return logits[keep]

    def _token(self, seq: Sequence, token: int, logprob: link.TokenLogprob | None) -> None:
        """A token was sampled for ``seq``."""
        output = link.Output(
            id=seq.id,
            index=seq.output_index,
            tokens=[token],
            logprobs=None if logprob is None else [logprob],
            num_cached=seq.num_cached,
            prompt_logprobs=seq.prompt_logprobs,
        )
        seq.prompt_logprobs = None
        seq.append(token)
        self._counters["sampled_tokens"] += 1
        params = seq.sampling
        if token in self._eos and not params.ignore_eos:
            output.finish = "stop"
        elif token in params.stop_token_ids:
            output.finish, output.stop_token = "stop", token
        elif seq.output_index >= params.max_tokens or seq.num_tokens >= self._scheduler.limits.max_model_len:
            output.finish = "length"
        self._emit(seq, output)
        if output.finish is not None:
            self._end(seq, "finished")
            return
        self._role.computed(seq, token)
        if seq.state is State.FINISHED:
            self._seqs.pop(seq.id, None)

    # --- messages -----------------------------------------------------------------------------------

    def _receive(self) -> None:
        for origin, payload in self._channel.receive():
            try:
                if origin:
                    self._from_router(origin, link.decode_to_node(payload))
                else:
                    self._from_node(wire.decode_to_engine(payload))
            except msgspec.DecodeError as error:
                log.warning("dropped a message that cannot be read: %s", error)

    def _from_router(self, origin: int, message: link.ToNode) -> None:
        match message:
            case link.Submit():
                self._submit(origin, message)
            case link.Abort():
                for id in message.ids:
                    if (seq := self._seqs.get(id)) is None:
                        self._role.abandoned(id)
                    else:
                        self._counters["aborts"] += 1
                        self._end(seq, "aborted")
            case link.Peers():
                self._peers(message)

    def _peers(self, peers: link.Peers) -> None:
        sources = []
        for source in peers.sources:
            if why := checks.source_problem(source):
                log.warning("a router names a prefill node %.100r that cannot be: %s", source.node_id, why)
            else:
                sources.append(source)
        self._role.peers(link.Peers(sources))

    def _from_node(self, message: wire.ToEngine) -> None:
        match message:
            case wire.Drop():
                self._submits.pop(message.origin, None)
                for seq in [s for s in self._seqs.values() if s.origin == message.origin]:
                    self._counters["aborts"] += 1
                    self._end(seq, "its router is gone")
                self._role.dropped(message.origin)
            case wire.Drain():
                self._draining = True
                self._status_due_s = 0.0
            case wire.Shutdown():
                self._stopping = True
            case wire.Sleep():
                self._told_to_sleep(message)
            case wire.Wake():
                self._answer(message.number, self._wake(message.tags))
            case link.Peers():
                self._peers(message)

    def _submit(self, origin: int, submit: link.Submit) -> None:
        self._submits[origin] = submit.number
        failure = self._refusal(submit)
        if failure is not None:
            self._counters[f"failures_{failure.kind}"] += 1
            if failure.kind == "invalid":
                log.warning("attempt %.100r is refused: %s", submit.id, failure.message)
            refused = link.Output(id=submit.id, index=submit.num_output, tokens=[], failure=failure)
            self._outbound[origin].append(refused)
            return
        tokens = np.frombuffer(submit.tokens, dtype="<i4")
        limit = self._scheduler.limits.max_model_len
        now_s = time.monotonic()
        seq = Sequence(
            submit.id,
            origin,
            tokens,
            len(tokens) - submit.num_output,
            submit.sampling,
            capacity=min(limit, len(tokens) - submit.num_output + submit.sampling.max_tokens) + 1,
            handoff=submit.handoff,
            source=submit.source,
            arrival_s=now_s - submit.age_s,
            admitted_s=now_s,
        )
        self._seqs[seq.id] = seq
        self._counters["requests"] += 1
        self._counters["prompt_tokens"] += seq.num_prompt
        output = self._role.submitted(seq)
        if output is not None:
            self._emit(seq, output)
        if seq.state is State.WAITING:
            self._scheduler.add(seq)

    def _refusal(self, submit: link.Submit) -> link.Failure | None:
        """Why this attempt cannot be taken. Routers check first; a node never relies on it."""
        if self._draining:
            return link.Failure("refused", "this node is shutting down", retry_after_s=1.0)
        if self._bedtime is not None or self._presence.level:
            return link.Failure("refused", "this node goes to sleep", retry_after_s=1.0)
        if submit.id in self._seqs:
            return link.Failure("invalid", f"attempt {submit.id} is running already")
        why = checks.problem(submit, self._vocab_size, self._scheduler.limits.max_model_len)
        if why:
            return link.Failure("invalid", why)
        return self._scheduler.refuses(self._queued, begun=submit.num_output > 0)

    @property
    def _queued(self) -> int:
        """Sequences without blocks, wherever they wait."""
        return len(self._scheduler.waiting) + self._role.queued

    # --- ends ---------------------------------------------------------------------------------------

    def _end(self, seq: Sequence, reason: str) -> None:
        """Ends a sequence for good on this engine; its blocks go back now, or when its pull has stopped."""
        self._seqs.pop(seq.id, None)
        self._role.ended(seq, reason)
        if seq.state in (State.WAITING, State.RUNNING):
            self._scheduler.remove(seq)

    def _fail(self, seq: Sequence, failure: link.Failure) -> None:
        self._counters[f"failures_{failure.kind}"] += 1
        self._emit(seq, link.Output(id=seq.id, index=seq.output_index, tokens=[], failure=failure))
        self._end(seq, failure.message)

    def _emit(self, seq: Sequence, output: link.Output) -> None:
        self._outbound[seq.origin].append(output)

    def _flush(self) -> None:
        for origin, outputs in self._outbound.items():
            self._channel.send_router(origin, link.Outputs(outputs))
        self._outbound.clear()

    # --- sleep --------------------------------------------------------------------------------------

    def _told_to_sleep(self, order: wire.Sleep) -> None:
        if not order.now:
            self._bedtime, self._bedtime_due_s = order, math.inf
            self._status_due_s = 0.0
        elif self._bedtime is not None and self._bedtime.number == order.number:
            self._bedtime_due_s = time.monotonic() + TRANSFERS_END_S
            for seq in list(self._seqs.values()):
                self._end(seq, "the node goes to sleep")

    def _turn_in(self) -> None:
        """Carries out an order to sleep once nothing runs, and never while a transfer may still write to a block."""
        order = self._bedtime
        if order is None:
            return
        hurried = self._bedtime_due_s < math.inf
        if self._seqs or self._role.pulling or (self._role.leases and not hurried):
            if time.monotonic() > self._bedtime_due_s:
                self._bedtime = None
                self._answer(
                    order.number,
                    f"{self._role.pulling} transfers from other nodes have not ended within {TRANSFERS_END_S:g} s, and "
                    "may still write to the KV cache: try again when those nodes answer",
                )
            return
        if not self._presence.level and not self._role.leases:
            self._check_idle()
        self._bedtime = None
        failure = ""
        try:
            with self._pulse.unbounded():
                self._presence.sleep(order.level)
        except Exception as error:
            log.exception("the engine cannot fall asleep")
            failure = "; ".join(filter(None, (_sentence(error), self._wake(TAGS))))
        self._role_changed()
        self._answer(order.number, failure)

    def _wake(self, tags: Collection[str]) -> str:
        """Brings tags back, and the engine with the last of them. Returns what went wrong, if anything did."""
        try:
            with self._pulse.unbounded():
                ready = self._presence.wake(tags, self.load())
        except Exception as error:
            log.exception("the engine cannot wake up")
            return _sentence(error)
        self._role_changed()
        if ready is not None:
            ready.load = self.load()
            self._channel.send_node(ready)
        return ""

    def _role_changed(self) -> None:
        self._poller.unregister(self._role.fileno())
        self._role = self._presence.role
        self._poller.register(self._role.fileno(), zmq.POLLIN)

    def _answer(self, number: int, failure: str) -> None:
        self._status_due_s = 0.0
        self._report()
        asleep = self._presence.sleeper.asleep
        self._channel.send_node(wire.SleepState(number, self._presence.level, asleep, failure))

    def close(self) -> None:
        """Ends what peers can reach. After ``run``."""
        self._presence.close()

    # --- status -------------------------------------------------------------------------------------

    def _report(self) -> None:
        now_s = time.monotonic()
        idle = not self._seqs and not self._role.leases and not self._role.pulling
        misfits = self._role.misfits()
        if now_s >= self._status_due_s or idle != self._reported_idle or misfits != self._reported_misfits:
            self._reported_misfits = misfits
            self._reported_idle = idle
            self._status_due_s = now_s + STATUS_INTERVAL_S
            if idle and not self._checked_idle:
                self._check_idle()
            memory = self._presence.sleeper.report()
            status = link.Status(self.load(), self._counter_snapshot(), memory, misfits=misfits)
            self._channel.send_node(wire.Report(status, self._submits))
        if self._draining and idle and not self._drained_sent:
            self._drained_sent = True
            self._channel.send_node(wire.Drained())

    def _check_idle(self) -> None:
        """Nothing runs: every block must be back. A leak is loud, counted, and shows in the metrics."""
        self._checked_idle = True
        try:
            self._kv.check(idle=True)
        except ValueError as error:
            self._counters["leaks"] += 1
            log.error("KV blocks are not where they should be while idle: %s", error)

    def load(self) -> link.Load:
        queued = self._queued
        return link.Load(
            waiting=queued,
            running=len(self._scheduler.running),
            waiting_tokens=self._scheduler.waiting_tokens,
            groups=self._kv.usage(),
            leases=self._role.leases,
            pulling=self._role.pulling,
            draining=self._draining or self._bedtime is not None or self._presence.level > 0,
            queued=queued,
            max_queue=self._scheduler.limits.max_queue,
            queue_wait_s=self._scheduler.wait_s(queued),
        )

    def _counter_snapshot(self) -> dict[str, float]:
        return {
            "leaks": 0.0,
            **self._counters,
            "preemptions": self._scheduler.num_preemptions,
            "queue_seconds": self._scheduler.queue_seconds,
            "started": self._scheduler.num_started,
            "prefix_query_tokens": self._scheduler.prefix_queries,
            "prefix_hit_tokens": self._scheduler.prefix_hits,
            **self._presence.counters(),
        }


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, PDServeError) else f"{type(error).__name__}: {error}"
