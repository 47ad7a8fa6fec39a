"""One log format for every process. Called once, by each process's entry point."""

from __future__ import annotations

import logging
import sys
from datetime import datetime


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """ISO 8601 with the offset from UTC, so that logs of several machines can be put together."""
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def configure(level: str, process: str, *, access_log: bool = True) -> None:
    """Logs to standard error. ``process`` says who speaks where several share a terminal, e.g. ``decode``.

    ``access_log``: a line for every request that was answered.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("pd_serve.access").setLevel(logging.NOTSET if access_log else logging.WARNING)
    # Libraries tell of every request at info; their warnings stay.
    for name in ("httpx", "httpcore", "uvicorn", "asyncio", "websockets"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
