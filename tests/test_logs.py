"""What processes log, to read and to collect."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from pd_serve import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("pd_serve.access").setLevel(logging.NOTSET)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_json_is_an_object_a_line_whatever_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "router", form="json")
    log = logging.getLogger("pd_serve.somewhere")
    log.info('one %s\nof two lines, "quoted", ü', "text", extra={"request_id": "r1", "fields": {"status": 200}})
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("it failed")
    log.debug("too little")
    logging.getLogger("uvicorn.error").warning("of a library")
    first, second, third = map(json.loads, said(capsys))
    assert (first["level"], first["process"], first["logger"]) == ("INFO", "router", "pd_serve.somewhere")
    assert first["message"] == 'one text\nof two lines, "quoted", ü'
    assert (first["request_id"], first["status"]) == ("r1", 200)
    assert first["time"][10] == "T" and first["pid"] > 0
    assert "Traceback" in second["exception"] and "ValueError: no" in second["exception"]
    assert "request_id" not in second and third["logger"] == "uvicorn.error"


def test_text_is_a_line_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "router", access_log=False)
    logging.getLogger("pd_serve.a").info("said", extra={"request_id": "r1", "fields": {"status": 200}})
    logging.getLogger("pd_serve.access").info("not wanted")
    (line,) = said(capsys)
    assert line.endswith(" INFO router pd_serve.a: said")
