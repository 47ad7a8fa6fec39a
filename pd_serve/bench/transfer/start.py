"""Starts a reader process for a job: what ``bench transfer`` and ``doctor`` share. Imports nothing that moves bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import msgspec

from pd_serve import records
from pd_serve.bench.transfer.job import Job

_READER = "pd_serve.bench.transfer.reader"


async def run_reader(
    job: Job, on_record: Callable[[dict[str, Any]], None], timeout_s: float | None = None
) -> records.Outcome:
    """Runs the job to its end. The directory of its sockets is removed here, also when the reader had to be killed."""
    with tempfile.TemporaryDirectory(prefix="pd-serve-bench-") as directory:
        order = msgspec.json.encode(msgspec.structs.replace(job, directory=directory))
        return await records.run([_READER], on_record, stdin=order, timeout_s=timeout_s)
