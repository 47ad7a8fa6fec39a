"""What a check finds, as plain data: checks return it, the report prints it or writes it as JSON."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"  # works, and could be better or should be known
    PROBLEM = "problem"  # far slower than this machine could be, or not working


class Finding(msgspec.Struct, frozen=True):
    level: Level
    what: str
    value: str
    fix: str = ""  # what to change; every problem has one
    broken: bool = False  # pd-serve cannot do without it


class Section(msgspec.Struct, frozen=True):
    """The findings of one room of checks."""

    name: str
    title: str
    findings: list[Finding]
    seconds: float


def ok(what: str, value: str) -> Finding:
    return Finding(Level.OK, what, value)


def note(what: str, value: str, fix: str = "") -> Finding:
    return Finding(Level.NOTE, what, value, fix)


def problem(what: str, value: str, fix: str) -> Finding:
    return Finding(Level.PROBLEM, what, value, fix)


def broken(what: str, value: str, fix: str) -> Finding:
    return Finding(Level.PROBLEM, what, value, fix, broken=True)


def size(num_bytes: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
