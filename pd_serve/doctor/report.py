"""Findings as text and as JSON. Pure functions of what the checks found."""

from __future__ import annotations

import platform
from typing import Any

import msgspec

from pd_serve import __version__
from pd_serve.doctor.findings import Level, Section
from pd_serve.doctor.selftest import Rate

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}


def as_json(sections: list[Section], rates: list[Rate]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "version": __version__,
        "host": platform.node(),
        "broken": any(finding.broken for section in sections for finding in section.findings),
        "counts": {level.value: count(sections, level) for level in Level},
        "sections": [msgspec.to_builtins(section) for section in sections],
        "lanes": [msgspec.to_builtins(rate) for rate in rates],
    }


def count(sections: list[Section], level: Level) -> int:
    return sum(finding.level is level for section in sections for finding in section.findings)


def show(sections: list[Section]) -> None:
    """Prints sections in order, then how many findings ask for something."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for section in sections:
        if not section.findings:
            continue
        console.print(Text(section.title, style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=9)
        table.add_column(min_width=18, max_width=34)
        table.add_column(overflow="fold")
        for finding in section.findings:
            level = Text("  " + finding.level.value, style=_STYLES[finding.level])
            table.add_row(level, Text(finding.what), Text(finding.value))
            if finding.fix:
                table.add_row(
                    "", Text("-> what to do", style="dim", justify="right"), Text(finding.fix, style="italic")
                )
        console.print(table)
        console.print()
    problems, notes = count(sections, Level.PROBLEM), count(sections, Level.NOTE)
    broken = any(finding.broken for section in sections for finding in section.findings)
    verdict = "pd-serve cannot work here as it is" if broken else "pd-serve works here"
    console.print(Text(f"{verdict}; {_many(problems, 'problem')}, {_many(notes, 'note')}", style="bold"))


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
