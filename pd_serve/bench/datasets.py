"""What requests ask for: made up, or taken from a file of conversations or a recorded trace. No network.

Called by :mod:`pd_serve.bench.serve`; :mod:`pd_serve.bench.prompts` makes bodies of it. A file is known by what is in
it, whatever its name (``.gz`` is unpacked): conversations in ShareGPT's shape; a trace of arrivals and lengths as CSV
(``timestamp_ms,input_tokens,output_tokens``, Azure's public ones); one with shared prefixes as lines of JSON,
``[timestamp_ms, input_length, output_length, hash_ids]`` or an object of these (Mooncake's).
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pd_serve.errors import ConfigError

RANDOM = "random"
_CHARACTERS_PER_TOKEN = 4  # of English, roughly: a client has no tokenizer
_SHAPES = "conversations as ShareGPT has them (JSON), or a trace (CSV, or a list a line)"
_COLUMNS = ("timestamp_ms", "input_tokens", "output_tokens")
_FIELDS = ("timestamp", "input_length", "output_length")


class Ask(NamedTuple):
    """One request. Lengths in tokens; of texts they are estimates."""

    input_len: int
    output_len: int
    at_s: float = 0.0  # after the trace's begin
    blocks: tuple[int, ...] = ()  # names of the prompt's parts: equal ones are equal text. Empty: it is like no other
    text: str = ""


class Dataset(NamedTuple):
    asks: list[Ask]
    timed: bool = False  # ``at_s`` says when each is sent
    left_out: int = 0  # that are longer than the model takes


def read(path: str) -> Dataset:
    """All requests of a file. Raises ConfigError."""
    try:
        lines = _text(path)
        found = _conversations(lines) if _is_json(lines) else _trace(lines)
    except OSError as error:
        raise ConfigError(f"--dataset: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--dataset: {path} is none that is known: {error}; it may hold {_SHAPES}") from error
    if not found.asks:
        raise ConfigError(f"--dataset: {path} has no request in it; it may hold {_SHAPES}")
    return found


def choose(dataset: Dataset, count: int, seed: int, longest: int) -> Dataset:
    """Up to ``count`` of them: a trace's first, any conversations. ``longest``: prompt and output together; 0: any."""
    asks = dataset.asks if dataset.timed else random.Random(seed).sample(dataset.asks, len(dataset.asks))
    fitting = [ask for ask in asks if not longest or ask.input_len + ask.output_len <= longest]
    if not fitting:
        raise ConfigError(f"--dataset: every request in it is longer than the {longest} tokens that the model takes")
    return Dataset(fitting[:count], dataset.timed, len(asks) - len(fitting))


def _text(path: str) -> str:
    data = Path(path).read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")


def _is_json(text: str) -> bool:
    """Whether it is one document, or objects with turns, and no trace."""
    first = text.lstrip().partition("\n")[0]
    return first.startswith("[{") or first.strip() == "[" or any(f'"{name}"' in first for name in _TURNS)


_TURNS = ("conversations", "messages")
_PEOPLE = ("human", "user")


def _conversations(text: str) -> Dataset:
    """The first question of each, and the length of its answer."""
    entries = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    asks = []
    for entry in entries:
        turns = next((entry[name] for name in _TURNS if name in entry), list[Any]())
        said = [(turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")) for turn in turns]
        said = [(who, what) for who, what in said if who != "system"]
        if len(said) > 1 and said[0][0] in _PEOPLE and all(isinstance(what, str) and what for _, what in said[:2]):
            question, answer = said[0][1], said[1][1]
            asks.append(Ask(_tokens(question), _tokens(answer), text=question))
    return Dataset(asks)


def _tokens(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_PER_TOKEN)


def _trace(text: str) -> Dataset:
    rows = sorted(_json_rows(text) if text.lstrip()[:1] in ("[", "{") else _csv_rows(text))
    begin_ms = rows[0][0] if rows else 0.0
    return Dataset([Ask(into, out, (ms - begin_ms) / 1000, blocks) for ms, into, out, blocks in rows], timed=True)


def _csv_rows(text: str) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
    table = csv.DictReader(text.splitlines())
    if missing := [name for name in _COLUMNS if name not in (table.fieldnames or ())]:
        raise ValueError(f"it has no column {missing[0]}")
    for row in table:
        ms, into, out = (row[name] for name in _COLUMNS)
        yield float(ms), _length(into), _length(out), ()


def _json_rows(text: str) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
    for line in filter(str.strip, text.splitlines()):
        row: Any = json.loads(line)
        if isinstance(row, dict):
            row = [*(row[name] for name in _FIELDS), row.get("hash_ids", [])]
        ms, into, out, *blocks = row
        yield float(ms), _length(into), _length(out), _names(blocks)


def _length(value: Any) -> int:
    """Of a request that was recorded: one without output asked for nothing that can be measured."""
    return max(1, int(value))


def _names(blocks: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(name) for name in blocks[0]) if blocks else ()
