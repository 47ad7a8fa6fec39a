"""One log format for every process. Called once, by each process's entry point."""

from __future__ import annotations

import logging
import sys


def configure(level: str, process: str) -> None:
    """Logs to standard error. ``process`` says who speaks where several share a terminal, e.g. ``decode``."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s.%(msecs)03d %(levelname)s {process} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # Libraries tell of every request at info; their warnings stay.
    for name in ("httpx", "httpcore", "uvicorn", "asyncio", "websockets"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
