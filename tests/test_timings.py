"""What was timed: for which rows it counts, and how it is kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pd_serve.timings import Timed, by_rows, read, write


def named(rows: int, name: str) -> str:
    return {"bus": "bus", "train": "train"}[name]


TIMED = (Timed(1, "bus", 7.0, 7.0), Timed(4, "train", 8.0, 9.5), Timed(6, "bus", 9.0, 9.0))


def test_rows_use_what_the_next_larger_ones_do() -> None:
    assert [way == "train" for way in by_rows(TIMED)] == [False, False, True, True, True, False, False]
    assert by_rows(()) == []


def test_what_was_timed_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "new" / "b.json"
    assert read(file, (1, 4), named) is None
    write(file, TIMED)
    assert read(file, (1, 4, 6), named) == TIMED
    assert read(file, (4,), named) == TIMED[1:2]
    assert read(file, (1, 4, 6, 8), named) is None  # another ladder: timed again
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 2, "timed": [[]]}',
        '{"format": 2, "timed": [[1, "by post", 1, 1]]}',
    ],
)
def test_a_damaged_file_is_ignored(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.json"
    file.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert read(file, [1], named) is None
    assert str(file) in caplog.text


def test_an_older_form_is_timed_again_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"format": 1, "timed": []}')
    assert read(file, [1], named) is None
    assert not caplog.text
