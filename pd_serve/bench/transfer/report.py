"""Figures of a run, as a table. Pure functions of the result that ``--json`` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pd_serve.values import render_size

if TYPE_CHECKING:
    from rich.table import Table

LIMIT_NAMES = {"memcpy": "memcpy", "nixl": "contiguous NIXL READ"}


def limit_gb_per_s(result: dict[str, Any]) -> float:
    """The limit that percentages are of: the fastest way known to move the same bytes. 0 where none was measured."""
    return max((limit["gb_per_s"] for limit in result["limits"] if limit.get("gb_per_s")), default=0.0)


def table(result: dict[str, Any]) -> Table:
    """A row for each transport and block size, a column for each pattern and number of requests."""
    from rich.table import Table

    limit = limit_gb_per_s(result)
    columns = sorted({(case["scattered"], case["in_flight"]) for case in result["cases"]})
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("transport")
    shown.add_column("block", justify="right")
    for scattered, in_flight in columns:
        shown.add_column(f"{'scattered' if scattered else 'contiguous'} x{in_flight}", justify="right")
    by_row: dict[tuple[str, int], dict[tuple[bool, int], float]] = {}
    for case in result["cases"]:
        row = by_row.setdefault((case["lane"], case["block_bytes"]), {})
        row[case["scattered"], case["in_flight"]] = case["gb_per_s"]
    last = ""
    for (lane, block_bytes), rates in by_row.items():
        cells = [_rate(rates[column], limit) if column in rates else "-" for column in columns]
        shown.add_row(lane if lane != last else "", render_size(block_bytes), *cells)
        last = lane
    return shown


def _rate(gb_per_s: float, limit: float) -> str:
    share = f" [dim]{gb_per_s / limit:4.0%}[/dim]" if limit else ""
    return f"{gb_per_s:.4g}{share}"


def load_table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("transport", "batch", "block", "linears alone, ms", "during pulls, ms", "slowdown", "GB/s"):
        shown.add_column(name, justify="left" if name == "transport" else "right")
    for load in result["load"]:
        shown.add_row(
            load["lane"],
            str(load["batch"]),
            render_size(load["block_bytes"]),
            f"{load['alone_ms']:.3f}",
            f"{load['loaded_ms']:.3f}",
            f"x{load['slowdown']:.3f}",
            f"{load['gb_per_s']:.4g}",
        )
    return shown


def title(result: dict[str, Any]) -> str:
    """What was measured, in a line."""
    s = result["settings"]
    where = f"{s['memory']} memory of cuda:{s['devices'][0]} to cuda:{s['devices'][1]}" if s["cuda"] else "host memory"
    parts = [f"GB/s, {where}, {render_size(s['size'])} a pull, median of {s['repeats']}"]
    if tuple(s["tp"]) != (1, 1):
        parts.append(f"tensor parallelism {s['tp'][0]} to {s['tp'][1]}")
    if s["source_block_tokens"] != s["reader_block_tokens"]:
        parts.append(f"blocks of {s['source_block_tokens']} to {s['reader_block_tokens']} tokens")
    return ", ".join(parts)


def lines(result: dict[str, Any]) -> list[str]:
    """What stands under the table."""
    text = []
    for limit in result["limits"]:
        name = LIMIT_NAMES[limit["name"]]
        rate = f"{limit['gb_per_s']:.4g} GB/s" if limit.get("gb_per_s") else f"not measured: {limit['why']}"
        text.append(f"limit, {name}: {rate}")
    if limit_gb_per_s(result):
        text.append("percentages are of the fastest limit")
    text += [f"{lane}: {why}" for lane, why in result["failed"].items()]
    return text
