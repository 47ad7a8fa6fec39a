"""``pd-serve bench serve``: loads an OpenAI endpoint and says how fast it answered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from pd_serve import __version__
from pd_serve.bench import load, report
from pd_serve.bench.client import Client, HttpError
from pd_serve.bench.datasets import RANDOM, Ask, Dataset, choose, read
from pd_serve.bench.prompts import Bodies
from pd_serve.config import BenchConfig
from pd_serve.errors import ConfigError, PDServeError


def run(config: BenchConfig) -> int:
    """Prints a table; exit status 1 when a request failed. Raises PDServeError."""
    dataset = None if config.dataset == RANDOM else read(config.dataset)
    if config.endpoint == "chat" and config.prompt == "ids":
        config = dataclasses.replace(config, prompt="text")
    result: dict[str, Any] = uvloop.run(_run(config, dataset))
    _print(result, config)
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {config.json}: {error.strerror}") from error
    return 1 if result["failed"] else 0


async def _run(config: BenchConfig, dataset: Dataset | None) -> dict[str, Any]:
    seed = config.seed if config.seed >= 0 else random.SystemRandom().randrange(1 << 31)
    client = Client(config.base_url, config.api_key, config.timeout_s)
    try:
        model, longest = await _model(client, config)
        if dataset is not None:
            dataset = choose(dataset, config.requests, seed, longest)
            _say_what_is_missing(dataset, config, longest)
        bodies = Bodies(config, model, seed)
        usual = Ask(config.input_len, config.output_len)
        jobs = [load.Job(usual, bodies.of(usual)) for _ in range(config.warmup)]
        if config.warmup:
            with _progress(config.warmup, "warm-up") as finished:
                await load.closed_loop(client, config, jobs, finished)
        asks = [usual] * config.requests if dataset is None else dataset.asks
        jobs = [load.Job(ask, bodies.of(ask)) for ask in asks]
        with _progress(len(jobs)) as finished:
            if config.request_rate:
                times_s = load.arrivals(config.request_rate, seed)
                records = await load.open_loop(client, config, jobs, times_s, finished)
            elif dataset is not None and dataset.timed and config.trace_speed:
                recorded_s = [ask.at_s / config.trace_speed for ask in asks]
                records = await load.open_loop(client, config, jobs, recorded_s, finished)
            else:
                records = await load.closed_loop(client, config, jobs, finished)
    finally:
        client.close()
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("api_key", "json")}
    begin_s = min(record.sent_s for record in records)
    each = [
        {
            "sent_s": record.sent_s - begin_s,
            "e2e_s": record.end_s - record.sent_s,
            "token_times_s": [time_s - record.sent_s for time_s in record.token_times_s],
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "finish_reason": record.finish_reason,
            "error": record.error,
        }
        for record in records
    ]
    settings |= {"model": model, "seed": seed}
    return {"version": __version__, "settings": settings, **report.figures(records), "requests": each}


async def _model(client: Client, config: BenchConfig) -> tuple[str, int]:
    """Its name, and how many tokens it takes in all; 0 where the endpoint does not say. Raises PDServeError."""
    try:
        status, body, _ = await client.get("/v1/models")
        if status != 200:
            hint = " (give --api-key)" if status == 401 else ""
            raise HttpError(f"HTTP {status}: {body.decode(errors='replace')[:200]}{hint}")
        served = json.loads(body)["data"]
        model = next((each for each in served if each["id"] == config.model), {} if config.model else served[0])
        return config.model or str(model["id"]), int(model.get("max_model_len") or 0)
    except (HttpError, ValueError, LookupError, TypeError) as error:
        if config.model:
            return config.model, 0
        raise PDServeError(f"{config.base_url} does not name a model ({error}); is it up? Or give --model") from error


def _say_what_is_missing(dataset: Dataset, config: BenchConfig, longest: int) -> None:
    if dataset.left_out:
        print(f"{dataset.left_out} requests of {config.dataset} are longer than {longest} tokens and left out")
    if len(dataset.asks) < config.requests:
        print(f"{config.dataset} has {len(dataset.asks)} requests for this model, {config.requests} were asked for")


@contextlib.contextmanager
def _progress(total: int, what: str = "requests") -> Iterator[Callable[[load.Record], None]]:
    """A bar on a terminal, redrawn by the event loop: a thread would compete with the measurement."""
    if not sys.stderr.isatty():
        yield lambda _record: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
    bar = progress.add_task(what, total=total)

    async def redraw() -> None:
        while True:
            await asyncio.sleep(0.5)
            progress.refresh()

    with progress:
        drawing = asyncio.get_running_loop().create_task(redraw())
        try:
            yield lambda _record: progress.advance(bar)
        finally:
            drawing.cancel()


def _how(config: BenchConfig) -> str:
    """What was sent, and when."""
    what, when = f"{config.input_len} tokens in, {config.output_len} out", f"{config.concurrency} clients"
    if config.dataset != RANDOM:
        what = f"requests of {config.dataset}"
    if config.request_rate:
        when = f"{config.request_rate:g} requests/s"
    return f"{when}, {what}"


def _print(result: dict[str, Any], config: BenchConfig) -> None:
    from rich.console import Console

    if result["completed"]:
        settings = result["settings"]
        print(f"{settings['model']} at {config.base_url}: {_how(config)}, seed {settings['seed']}\n")
        Console(highlight=False).print(report.table(result))
        print()
    print("\n".join(report.lines(result)))
