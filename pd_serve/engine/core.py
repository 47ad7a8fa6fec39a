"""The engine's loop: take messages, plan a step, compute it, say what came out.

One thread. Sleeps in ``poll`` when there is nothing to do. Everything that a client is owed leaves through ``Output``
messages: every admitted sequence ends in exactly one of a finish reason, a failure, or an abort that its router wants.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import zmq

from pd_serve.compute.executor import Executor
from pd_serve.compute.step import Sampled
from pd_serve.engine import checks
from pd_serve.engine.arrivals import Arrivals
from pd_serve.engine.channel import Channel
from pd_serve.engine.grammars import Grammars
from pd_serve.engine.lifecycle import Answer, Lifecycle
from pd_serve.engine.pipeline import Collected, Pipeline
from pd_serve.engine.plan import StepBuilder, Work
from pd_serve.engine.pulse import Pulse
from pd_serve.engine.role import Role
from pd_serve.engine.scheduler import Scheduler
from pd_serve.engine.sequence import Sequence, State, TracedSequence
from pd_serve.grammar.constraints import Constraints
from pd_serve.interpreter import main_thread
from pd_serve.kv.manager import KVManager
from pd_serve.wire import engine as wire
from pd_serve.wire import link
from pd_serve.wire.chunks import pack
from pd_serve.wire.counted import COMPUTED_TOKENS, STEP_SECONDS, STEPS

log = logging.getLogger(__name__)

_PRIORITY_S = 1e7  # what a request may be younger for each step of priority and still come first: always
_STATUS_SOON_S = 0.05  # after a submit, where other routers place by what they heard last


class Engine:
    def __init__(
        self,
        *,
        kv: KVManager,
        scheduler: Scheduler,
        executor: Executor[Any],
        lifecycle: Lifecycle,
        channel: Channel,
        pulse: Pulse,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        status_interval_s: float,
        constraints: Constraints | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        """``status_interval_s``: between two reports of an engine that works; an idle one makes half as many.

        ``constraints``: for sequences with a grammar; None: none can be had. ``arrivals``: where there is a host tier.
        """
        self._kv = kv
        self._scheduler = scheduler
        self._executor = executor
        builder = StepBuilder(kv.layout.block_size, len(kv.layout.groups), eos_token_ids)
        self._pipeline = Pipeline(executor, builder, scheduler, pulse)
        # a step ahead, the device would leave its graph for single rows, and nobody has measured whether that pays
        self._grammars = Grammars(constraints, jumps=executor.depth == 0)
        self._arrivals = arrivals
        self._lifecycle = lifecycle
        self._channel = channel
        self._pulse = pulse
        self._eos = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._status_interval_s = status_interval_s
        self._seqs: dict[str, Sequence] = {}
        self._outbound: defaultdict[int, list[link.Output]] = defaultdict(list)
        self._followers: set[int] = set()  # origins that want to know what is cached
        self._prefix_frames = 0
        self._submits: dict[int, int] = {}  # by origin: the number of its last submit
        self._stopping = False
        self._draining = False
        self._drained_sent = False
        self._checked_idle = True
        self._reported_idle = True
        self._status_due_s = 0.0
        self._reported_misfits: dict[str, str] = {}
        self._counters: defaultdict[str, float] = defaultdict(float)

    @property
    def _role(self) -> Role:
        return self._lifecycle.role

    # --- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until the node says ``Shutdown``."""
        poller = zmq.Poller()
        poller.register(self._channel.socket, zmq.POLLIN)
        watch = _Watch(poller)
        worked = False
        while not self._stopping:
            if worked:
                wait_ms = self._pipeline.spare_ms()
            else:  # after an empty plan only a message or a transfer event can change anything
                wait_ms = math.ceil(max(0.0, self._status_due_s - time.monotonic()) * 1000)
            tier = -1 if self._arrivals is None else self._arrivals.fileno()
            watch.only(self._role.fileno(), self._grammars.fileno(), tier)
            self._pulse.rest()
            main_thread.at_work = False
            poller.poll(wait_ms)
            main_thread.at_work = True
            self._pulse.turn()
            worked = self.turn()

    def turn(self) -> bool:
        """Handles what has come, and computes a step when that is due. False: there was none to compute, so only what
        comes can change that.
        """
        self._receive()
        self._take_arrived()
        # before a step that may take long: clients wait for the answers, and routers place by the report
        self._flush()
        self._report()
        worked = bool(self._pipeline.spare_ms()) or self._step()
        self._grammars.tell()
        self._flush()
        if not self._busy:
            self._answer(self._lifecycle.turn_in(self.load, self._check_idle))
        return worked

    @property
    def _busy(self) -> bool:
        """Whether sequences, or what ended ones leave, still use blocks."""
        loading = self._arrivals is not None and self._arrivals.loading
        return bool(self._seqs) or self._pipeline.launched or loading

    def _take_arrived(self) -> None:
        if self._arrivals is not None:
            for seq in self._arrivals.events():
                self._role.computed(seq, None)
            self._arrivals.store()
        for seq, output in self._role.events():
            self._emit(seq, output)
            if output.failure is not None:
                self._forget(seq, output.failure.message, failed=True)

    def _step(self) -> bool:
        """Launches a step and books the one before it, or where the executor computes at once this one.

        False: there was nothing to do.
        """
        for seq, failure in self._grammars.wait():
            self._fail(seq, failure)
        for seq, tokens in self._grammars.forced():
            self._forced(seq, tokens)
        plan = self._scheduler.plan(launched=self._pipeline.launched)
        if plan is None:
            self._book_all(self._pipeline.collect())
            plan = self._scheduler.plan()
            assert plan is not None  # nothing is in flight
        if not plan and not self._pipeline.launched:
            return False
        self._checked_idle = False
        self._book_all(self._pipeline.turn(plan))
        self._counters[STEPS] += 1
        self._counters[STEP_SECONDS] = self._pipeline.busy_s
        self._counters[COMPUTED_TOKENS] += sum(work.num_tokens for work in plan)
        return True

    def _book_all(self, steps: Iterable[Collected]) -> None:
        """The results of steps reach their sequences, roles and routers."""
        for works, sampled in steps:
            if self._arrivals is not None:
                self._arrivals.computed(works)
            if sampled is None:
                why = "the node failed to compute this request; see its log"
                self._fail(works[0].seq, link.Failure("internal", why))
            else:
                self._book(works, sampled)

    def _book(self, works: list[Work], sampled: Sampled) -> None:
        samples = zip(sampled.tokens, sampled.logprobs, strict=True)
        prompt_logprobs = iter(sampled.prompt_logprobs)
        for work in works:
            seq = work.seq
            token, logprob = next(samples) if work.samples else (None, None)
            found = next(prompt_logprobs) if work.num_targets else []
            if not self._scheduler.collected(work):
                continue
            if seq.sampling.prompt_logprobs >= 0 and work.start < seq.num_prompt:
                seq.prompt_logprobs = [*((work.start and seq.prompt_logprobs) or [None]), *found]
            if token is None:
                self._role.computed(seq, None)
            elif (failure := self._grammars.refused(seq, token)) is not None:
                self._fail(seq, failure)
            else:
                self._token(seq, token, logprob)

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
        elif seq.num_tokens >= self._scheduler.limit(seq):
            output.finish = "length"
        self._emit(seq, output)
        if output.finish is not None:
            self._end(seq, "finished")
            return
        self._role.computed(seq, token)
        if seq.state is State.FINISHED:
            self._forget(seq, "handed over")

    def _forced(self, seq: Sequence, tokens: list[int]) -> None:
        """They come next, whatever the model says: computed in one step with the token before them."""
        for token in tokens:
            if seq.state is State.RUNNING:  # one of them may end it
                self._token(seq, token, None)
                self._counters["forced_tokens"] += 1

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
            case link.GetPrefixes():
                self._tell_prefixes()  # what others hear before, this one has with the whole
                self._followers.add(origin)
                far = self._kv.far
                whole = link.Prefixes(
                    self._prefix_frames,
                    pack(self._kv.named.held),
                    whole=True,
                    host_stored=b"" if far is None else pack(far.held),
                )
                self._channel.send_router(origin, whole)

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
                self._followers.discard(message.origin)
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
                self._status_due_s = 0.0
                if self._lifecycle.told(message):
                    for seq in list(self._seqs.values()):
                        self._end(seq, "the node goes to sleep")
            case wire.Wake():
                self._answer(self._lifecycle.wake(message, self.load))
            case wire.Listen():
                self._answer(self._lifecycle.listen(message, self.load))
            case wire.Forget():
                self._forget_prefixes()
                self._answer(self._lifecycle.answer(message.number))
            case link.Peers():
                self._peers(message)

    def _forget_prefixes(self) -> None:
        """No later prompt finds anything that was computed before; what runs keeps what it has."""
        if self._arrivals is not None:
            self._arrivals.forget()
        self._kv.forget([seq.blocks for seq in self._seqs.values() if seq.blocks is not None])

    def _submit(self, origin: int, submit: link.Submit) -> None:
        self._submits[origin] = submit.number
        if len(self._submits) > 1:
            self._status_due_s = min(self._status_due_s, time.monotonic() + _STATUS_SOON_S)
        failure = self._refusal(submit)
        if failure is not None:
            self._counters[f"failures_{failure.kind}"] += 1
            if failure.kind == "invalid":
                log.warning("attempt %.100r is refused: %s", submit.id, failure.message)
            refused = link.Output(id=submit.id, index=submit.num_output, tokens=[], failure=failure)
            self._outbound[origin].append(refused)
            return
        tokens = np.frombuffer(submit.tokens, dtype="<i4")
        num_prompt = len(tokens) - submit.num_output
        now_s = time.monotonic()
        sampling = submit.sampling
        if sampling.grammar is not None:
            sampling = msgspec.structs.replace(sampling, ignore_eos=False)  # it says where the text ends
        seq = (TracedSequence if submit.trace else Sequence)(
            submit.id,
            origin,
            tokens,
            num_prompt,
            sampling,
            capacity=min(num_prompt + submit.sampling.max_tokens, self._scheduler.limits.max_model_len) + 1,
            handoff=submit.handoff,
            source=submit.source,
            arrival_s=now_s - submit.age_s + submit.priority * _PRIORITY_S,
            admitted_s=now_s,
            salt=submit.salt,
        )
        self._seqs[seq.id] = seq
        if sampling.grammar is not None:
            self._grammars.open(seq, sampling.grammar)
        self._counters["requests"] += 1
        self._counters["prompt_tokens"] += seq.num_prompt
        output = self._role.submitted(seq)
        if isinstance(seq, TracedSequence):
            seq.begin(submit.trace)
        if output is not None:
            self._emit(seq, output)
        if seq.state is State.WAITING:
            self._scheduler.add(seq)

    def _refusal(self, submit: link.Submit) -> link.Failure | None:
        """Why this attempt cannot be taken. Routers check first; a node never relies on it."""
        if self._draining:
            return link.Failure("refused", "this node is shutting down", retry_after_s=1.0)
        if self._lifecycle.leaving:
            return link.Failure("refused", "this node goes to sleep", retry_after_s=1.0)
        if submit.id in self._seqs:
            return link.Failure("invalid", f"attempt {submit.id} is running already")
        why = checks.problem(submit, self._vocab_size, self._scheduler.limits.max_model_len)
        if not why and submit.sampling.grammar is not None:
            why = self._grammars.missing
        if why:
            return link.Failure("invalid", why)
        return self._scheduler.refuses(self._queued, begun=submit.num_output > 0)

    @property
    def _queued(self) -> int:
        """Sequences without blocks, wherever they wait."""
        return len(self._scheduler.waiting) + self._role.queued

    # --- ends ---------------------------------------------------------------------------------------

    def _forget(self, seq: Sequence, end: str, *, failed: bool = False) -> None:
        if self._seqs.pop(seq.id, None) is not None and isinstance(seq, TracedSequence):
            self._channel.send_node(seq.timeline(end, failed=failed))

    def _end(self, seq: Sequence, reason: str, *, failed: bool = False) -> None:
        """Ends a sequence for good on this engine; its blocks go back now, or when its pull has stopped."""
        self._forget(seq, reason, failed=failed)
        self._role.ended(seq, reason)
        if seq.state in (State.WAITING, State.LOADING, State.RUNNING):
            self._scheduler.remove(seq)

    def _fail(self, seq: Sequence, failure: link.Failure) -> None:
        self._counters[f"failures_{failure.kind}"] += 1
        self._emit(seq, link.Output(id=seq.id, index=seq.output_index, tokens=[], failure=failure))
        self._end(seq, failure.message, failed=True)

    def _emit(self, seq: Sequence, output: link.Output) -> None:
        self._outbound[seq.origin].append(output)

    def _flush(self) -> None:
        for origin, outputs in self._outbound.items():
            self._channel.send_router(origin, link.Outputs(outputs))
        self._outbound.clear()
        self._tell_prefixes()

    def _tell_prefixes(self) -> None:
        stored, evicted = self._kv.named.take()
        far = self._kv.far
        come, gone = ([], []) if far is None else far.take()
        if stored or evicted or come or gone:
            self._prefix_frames += 1
            frame = link.Prefixes(
                self._prefix_frames, pack(stored), pack(evicted), host_stored=pack(come), host_evicted=pack(gone)
            )
            for origin in self._followers:
                self._channel.send_router(origin, frame)

    # --- status -------------------------------------------------------------------------------------

    def _answer(self, answer: Answer | None) -> None:
        """What came of an order to sleep or to wake, after the status that includes it."""
        if answer is None:
            return
        if answer.ready is not None:
            answer.ready.load = self.load()
            self._channel.send_node(answer.ready)
        self._status_due_s = 0.0
        self._report()
        self._channel.send_node(answer.state)

    def close(self) -> None:
        """Ends what peers can reach. After ``run``."""
        self._lifecycle.close()
        self._grammars.close()

    def _report(self) -> None:
        now_s = time.monotonic()
        idle = not self._busy and not self._role.leases and not self._role.pulling
        misfits = self._role.misfits()
        if now_s >= self._status_due_s or idle != self._reported_idle or misfits != self._reported_misfits:
            self._reported_misfits = misfits
            self._reported_idle = idle
            self._status_due_s = now_s + self._status_interval_s * (2 if idle else 1)
            if idle and not self._checked_idle:
                self._check_idle()
            memory = self._executor.report()
            lanes = self._role.lanes()
            status = link.Status(self.load(), self._counter_snapshot(), memory, misfits=misfits, lanes=lanes)
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
            running=self._scheduler.num_placed,
            waiting_tokens=self._scheduler.waiting_tokens,
            groups=self._kv.usage(),
            leases=self._role.leases,
            pulling=self._role.pulling,
            draining=self._draining or self._lifecycle.leaving,
            queued=queued,
            max_queue=self._scheduler.limits.max_queue,
            queue_wait_s=self._scheduler.wait_s(queued),
            host_groups=self._kv.host_usage(),
        )

    def _counter_snapshot(self) -> dict[str, float]:
        return {
            "leaks": 0.0,
            **self._counters,
            "step_failures": self._pipeline.num_failures,
            "preemptions": self._scheduler.num_preemptions,
            **self._scheduler.times,
            "started": self._scheduler.num_started,
            "prefix_query_tokens": self._scheduler.prefix_queries,
            "prefix_hit_tokens": self._scheduler.prefix_hits,
            **({} if self._arrivals is None else self._arrivals.counters()),
            **self._lifecycle.counters(),
        }


class _Watch:
    """File descriptors of a poller, which may be others from turn to turn."""

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._fds: tuple[int, ...] = ()

    def only(self, *fds: int) -> None:
        """Below 0: none."""
        if fds != self._fds:
            for fd in {*self._fds} - {-1}:
                self._poller.unregister(fd)
            for fd in {*fds} - {-1}:
                self._poller.register(fd, zmq.POLLIN)
            self._fds = fds
