"""A sequence: one attempt at one choice of a request, from admission to its end.

Data only. The scheduler moves it between states, the KV manager owns ``blocks``.
"""

from __future__ import annotations

import time
from enum import Enum

import numpy as np
import numpy.typing as npt

from pd_serve.compute.step import Rows
from pd_serve.engine import adjust
from pd_serve.grammar.constraints import Constraint
from pd_serve.kv.manager import SequenceBlocks
from pd_serve.wire.engine import Timeline
from pd_serve.wire.link import SamplingParams, Source, TokenLogprob


class State(Enum):
    WAITING = "waiting"  # admitted; holds no blocks (or was preempted)
    PULLING = "pulling"  # decode node: its KV is expected from a prefill node
    LOADING = "loading"  # admitted; its KV comes from the host tier
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """``tokens[:num_tokens]`` is prompt then output; the first ``num_computed`` have their KV in blocks.

    ``num_scheduled``: with what launched steps write, which may be the token after the last known one. What they sample
    is known when they are collected.
    """

    __slots__ = (
        "_tokens",
        "adjusted",
        "admitted_s",
        "arrival_s",
        "blocks",
        "constraint",
        "handoff",
        "id",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_scheduled",
        "num_tokens",
        "origin",
        "placed_s",
        "prompt_logprobs",
        "salt",
        "sample_row",
        "sampling",
        "sampling_row",
        "source",
        "started",
        "started_s",
        "state",
        "waits",
    )

    def __init__(
        self,
        id: str,
        origin: int,
        tokens: npt.NDArray[np.int32],
        num_prompt: int,
        sampling: SamplingParams,
        *,
        capacity: int,
        handoff: bool = False,
        source: Source | None = None,
        arrival_s: float = 0.0,
        admitted_s: float = 0.0,
        salt: bytes = b"",
    ) -> None:
        self.id = id
        self.origin = origin  # which router asked
        self._tokens = np.empty(max(capacity, len(tokens)), dtype=np.int32)
        self._tokens[: len(tokens)] = tokens
        self.num_tokens = len(tokens)
        self.num_prompt = num_prompt  # the client's prompt; what follows is output (of any attempt)
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_cached = 0
        self.sampling = sampling
        self.handoff = handoff
        self.source = source
        self.arrival_s = arrival_s  # of the request at its router, on this engine's clock, by priority: the least first
        self.admitted_s = admitted_s  # of the attempt, here
        self.salt = salt  # which others it shares cached prefixes with
        # What may be sampled depends on the token before: no step is launched for it before that is known.
        self.waits = adjust.waits(sampling)
        self.adjusted = adjust.biases(sampling) or adjust.penalises(sampling)  # its logits, before one is chosen
        self.placed_s = 0.0  # it got blocks for KV that is to be pulled
        self.started = False  # it has run; a preempted one waits again
        self.started_s = 0.0
        self.state = State.WAITING
        self.blocks: SequenceBlocks | None = None
        self.sampling_row: Rows | None = None  # how it is sampled, made on first use
        self.sample_row = 0  # of the step launched last that samples for it
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.constraint: Constraint | None = None  # where there is a grammar

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """``[num_tokens]`` int32 view: prompt, then output."""
        return self._tokens[: self.num_tokens]

    @property
    def length(self) -> int:
        """Tokens when all that was launched has been collected: each step that reaches the end samples one."""
        return max(self.num_tokens, self.num_scheduled + 1)

    @property
    def in_flight(self) -> bool:
        """Whether a launched step writes to its blocks."""
        return self.num_scheduled > self.num_computed

    @property
    def unready(self) -> bool:
        """Whether it is not known yet which tokens its grammar permits, so that none can be sampled."""
        constraint = self.constraint
        return constraint is not None and not constraint.ready(self.num_tokens - self.num_prompt)

    @property
    def output_index(self) -> int:
        """Output index of the next token to be sampled."""
        return self.num_tokens - self.num_prompt

    def append(self, token: int) -> None:
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1


class TracedSequence(Sequence):
    """One whose times are wanted: it notes the first token by itself, so that others pay nothing for it."""

    __slots__ = ("base", "first_token_s", "pulled", "trace")

    def begin(self, trace: str) -> None:
        """When it has its state. ``trace``: the span of its submit."""
        self.trace = trace
        self.base = self.num_tokens
        self.first_token_s = 0.0
        self.pulled = self.state is State.PULLING

    def append(self, token: int) -> None:
        if self.num_tokens == self.base:
            self.first_token_s = time.monotonic()
        super().append(token)

    def timeline(self, end: str, *, failed: bool) -> Timeline:
        """When it has ended."""
        return Timeline(
            id=self.id,
            trace=self.trace,
            admitted_s=self.admitted_s,
            ended_s=time.monotonic(),
            end=end,
            failed=failed,
            pulled=self.pulled,
            handoff=self.handoff,
            placed_s=self.placed_s,
            started_s=self.started_s,
            first_token_s=self.first_token_s,
            tokens=self.base,
            cached=self.num_cached,
            made=self.num_tokens - self.base,
        )
