"""Requests, when they are sent, and what is written down of each.

Called by :mod:`pd_serve.bench.serve`. All times are the client's, from ``time.perf_counter``.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from pd_serve.bench.client import Client, HttpError
from pd_serve.bench.datasets import Ask
from pd_serve.config import BenchConfig

_ERROR_CHARS = 400


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as newer servers call it


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode = msgspec.json.Decoder(_Event).decode


class Job(NamedTuple):
    ask: Ask
    body: bytes


_UNSAID = Ask(0, 0)


@dataclass
class Record:
    """One request. Times in seconds."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)  # of events that carry text or tokens
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    ask: Ask = _UNSAID  # what it was for

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        if self.output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)


def text_of(choice: _Choice) -> str | None:
    delta = choice.delta
    return (delta.content or delta.reasoning_content or delta.reasoning) if delta else choice.text


async def send(client: Client, config: BenchConfig, body: bytes) -> Record:
    """One request, from its first byte sent to its last byte read. Never raises."""
    record = Record(time.perf_counter())
    chat = config.endpoint == "chat"

    def on_event(now_s: float, data: bytes) -> None:
        if data == b"[DONE]":
            return
        event = _decode(data)
        if event.error is not None:
            record.error = f"in the stream: {json.dumps(event.error)[:_ERROR_CHARS]}"
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.output_tokens = event.usage.completion_tokens
        for choice in event.choices:
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
            text = text_of(choice)
            # a completion's event without text still is a token (half a character, say), unless it only ends the stream
            if text or choice.token_ids or (not chat and choice.finish_reason is None):
                record.token_times_s.append(now_s)

    path = "/v1/chat/completions" if chat else "/v1/completions"
    try:
        status, answer, _ = await client.post(path, body, on_event)
        if status != 200:
            record.error = f"HTTP {status}: {answer.decode(errors='replace')[:_ERROR_CHARS]}"
            if status == 401:
                record.error += " (give --api-key)"
        elif record.finish_reason is None and record.error is None:
            record.error = "the stream ended without a finish reason"
    except HttpError as error:
        record.error = str(error)
    record.end_s = time.perf_counter()
    record.output_tokens = record.output_tokens or len(record.token_times_s)
    if record.error is None and not record.token_times_s:
        record.error = "no token received"
    return record


async def _sent(client: Client, config: BenchConfig, job: Job) -> Record:
    record = await send(client, config, job.body)
    record.ask = job.ask
    return record


async def closed_loop(
    client: Client, config: BenchConfig, jobs: Iterable[Job], finished: Callable[[Record], None]
) -> list[Record]:
    """``config.concurrency`` clients that each wait for one answer before they ask again."""
    queue = iter(jobs)
    records: list[Record] = []

    async def worker() -> None:
        for job in queue:
            record = await _sent(client, config, job)
            records.append(record)
            finished(record)

    await asyncio.gather(*(worker() for _ in range(config.concurrency)))
    return records


async def open_loop(
    client: Client,
    config: BenchConfig,
    jobs: Sequence[Job],
    times_s: Iterable[float],
    finished: Callable[[Record], None],
) -> list[Record]:
    """Each at its time from now on, whether or not earlier ones have ended."""
    records: list[Record] = []
    begin_s = time.perf_counter()

    async def one(job: Job) -> None:
        record = await _sent(client, config, job)
        records.append(record)
        finished(record)

    async with asyncio.TaskGroup() as group:
        for job, due_s in zip(jobs, times_s, strict=False):
            await asyncio.sleep(max(0.0, begin_s + due_s - time.perf_counter()))
            group.create_task(one(job))
    return records


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Times of requests that come at ``rate`` a second, with exponential gaps. Without end."""
    gaps, due_s = random.Random(seed + 1), 0.0
    while True:
        yield due_s
        due_s += gaps.expovariate(rate)
