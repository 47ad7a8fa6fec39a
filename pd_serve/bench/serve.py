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
from pd_serve.config import BenchConfig
from pd_serve.errors import ConfigError, PDServeError


def run(config: BenchConfig) -> int:
    """Prints a table; exit status 1 when a request failed. Raises PDServeError."""
    if config.endpoint == "chat" and config.prompt == "ids":
        config = dataclasses.replace(config, prompt="text")
    result: dict[str, Any] = uvloop.run(_run(config))
    _print(result, config)
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {config.json}: {error.strerror}") from error
    return 1 if result["failed"] else 0


async def _run(config: BenchConfig) -> dict[str, Any]:
    seed = config.seed if config.seed >= 0 else random.SystemRandom().randrange(1 << 31)
    client = Client(config.base_url, config.api_key, config.timeout_s)
    try:
        model = config.model or await _first_model(client, config)
        bodies = load.Bodies(config, model, seed)
        if config.warmup:
            with _progress(config.warmup, "warm-up") as finished:
                await load.closed_loop(client, config, bodies, config.warmup, finished)
        with _progress(config.requests) as finished:
            if config.request_rate:
                records = await load.open_loop(client, config, bodies, config.requests, finished, seed)
            else:
                records = await load.closed_loop(client, config, bodies, config.requests, finished)
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
    return {"version": __version__, "settings": settings, **report.figures(config, records), "requests": each}


async def _first_model(client: Client, config: BenchConfig) -> str:
    try:
        status, body, _ = await client.get("/v1/models")
        if status != 200:
            hint = " (give --api-key)" if status == 401 else ""
            raise HttpError(f"HTTP {status}: {body.decode(errors='replace')[:200]}{hint}")
        return str(json.loads(body)["data"][0]["id"])
    except (HttpError, ValueError, LookupError, TypeError) as error:
        raise PDServeError(f"{config.base_url} does not name a model ({error}); is it up? Or give --model") from error


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


def _print(result: dict[str, Any], config: BenchConfig) -> None:
    from rich.console import Console

    if result["completed"]:
        settings = result["settings"]
        how = f"{config.request_rate:g} requests/s" if config.request_rate else f"{config.concurrency} clients"
        print(
            f"{settings['model']} at {config.base_url}: {how}, {config.input_len} tokens in, {config.output_len} out, "
            f"seed {settings['seed']}\n"
        )
        Console(highlight=False).print(report.table(result))
        print()
    print("\n".join(report.lines(result, config)))
