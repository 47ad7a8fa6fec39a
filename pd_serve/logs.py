"""One log format for every process: lines to read, or JSON objects to collect. Set once, by each entry point.

What is of a request has its id as ``extra={"request_id": ...}``; further values of a line, where it has some, are in
``extra={"fields": {...}}``. Both are in JSON alone: a line to read says them in its words.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime


class _Text(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """ISO 8601 with the offset from UTC, so that logs of several machines can be put together."""
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class _Json(_Text):
    """An object a line, also for what has several, as exceptions do."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := getattr(record, "request_id", None)) is not None:
            said["request_id"] = request_id
        said |= getattr(record, "fields", {})
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


def configure(level: str, process: str, *, form: str = "text", access_log: bool = True) -> None:
    """Logs to standard error. ``process`` says who speaks where several share a terminal, e.g. ``decode``.

    ``form``: ``text`` or ``json``. ``access_log``: a line for every request that was answered.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = _Text(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
    handler.setFormatter(_Json(process) if form == "json" else text)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("pd_serve.access").setLevel(logging.NOTSET if access_log else logging.WARNING)
    # Libraries tell of every request at info; their warnings stay.
    for name in ("httpx", "httpcore", "uvicorn", "asyncio", "websockets"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
