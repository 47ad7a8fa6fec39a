"""Figures of a run, as data and as a table."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pd_serve.bench.load import Record

if TYPE_CHECKING:
    from rich.table import Table

TIMES = {
    "ttft": "time to first token",
    "itl": "between two tokens",
    "tpot": "per token after the first",
    "e2e": "whole request",
}


_REQUEST_ID = re.compile(r"""("?(?:request_id|id|created)"?\s*[:=]\s*)("[^"]*"|\d+)""")


_NUMBER = re.compile(r"(?<!HTTP )\b\d+")  # a status stays what it is


def counted(errors: Iterable[str]) -> dict[str, int]:
    """The most frequent ten. Those that differ in numbers or ids alone are counted as the first of them."""
    first: dict[str, str] = {}
    counts = Counter[str]()
    for error in errors:
        text = _REQUEST_ID.sub(r"\1...", error)
        counts[first.setdefault(_NUMBER.sub("0", text), text)] += 1
    return dict(counts.most_common(10))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds; empty without values."""
    if not seconds:
        return {}
    import numpy as np

    ms = [second * 1000 for second in seconds]
    names, percents = ("median", "p90", "p99", "min", "max"), (50, 90, 99, 0, 100)
    return {"mean": statistics.fmean(ms), **dict(zip(names, np.percentile(ms, percents).tolist(), strict=True))}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Everything ``--json`` writes. Throughput counts completed requests, from the first sent to the last ended."""
    good = [record for record in records if record.error is None]
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(records) - len(good),
        "errors": counted(record.error for record in records if record.error is not None),
    }
    if not good:
        return result
    duration_s = max(record.end_s for record in good) - min(record.sent_s for record in good)
    prompt_tokens = sum(record.prompt_tokens or record.ask.input_len for record in good)
    output_tokens = sum(record.output_tokens for record in good)
    times = {
        "ttft": [record.ttft_s for record in good],
        "itl": [after - before for record in good for before, after in pairwise(record.token_times_s)],
        "tpot": [tpot_s for record in good if (tpot_s := record.tpot_s) is not None],
        "e2e": [record.end_s - record.sent_s for record in good],
    }
    return result | {
        "duration_s": duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(good) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / duration_s,
        "tokens_per_event": output_tokens / max(1, sum(len(record.token_times_s) for record in good)),
        "short_outputs": sum(record.output_tokens != record.ask.output_len for record in good),
        **{f"{name}_ms": summary(seconds) for name, seconds in times.items()},
    }


def table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("ms")
    shown.add_column("", style="dim")
    columns = ("mean", "median", "p90", "p99", "max")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, meaning in TIMES.items():
        row = result[f"{name}_ms"]
        shown.add_row(name.upper(), meaning, *(f"{row[column]:.2f}" if row else "-" for column in columns))
    return shown


def lines(result: dict[str, Any]) -> list[str]:
    """What stands under the table."""
    text = []
    if result["completed"]:
        text.append(
            f"{result['completed']} requests in {result['duration_s']:.2f} s: "
            f"{result['requests_per_s']:.2f} requests/s, "
            f"{result['output_tokens_per_s']:.1f} output tokens/s, "
            f"{result['total_tokens_per_s']:.1f} tokens/s in all"
        )
        if result["short_outputs"]:
            text.append(f"{result['short_outputs']} answers have not as many tokens as were asked for")
        if result["tokens_per_event"] > 1.05:
            text.append(f"{result['tokens_per_event']:.2f} tokens an event: ITL is between events, TPOT is a token's")
    if result["failed"]:
        text.append(f"{result['failed']} request{'s' * (result['failed'] != 1)} failed:")
        text += [f"  {count} x {error}" for error, count in result["errors"].items()]
    return text
