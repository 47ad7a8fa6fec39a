"""Starts a reader process for jobs: what ``bench transfer`` and ``doctor`` share. Imports nothing that moves bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pd_serve import records
from pd_serve.bench.transfer.job import Job

_READER = "pd_serve.bench.transfer.reader"


async def run_reader(
    jobs: Sequence[Job], on_record: Callable[[dict[str, Any]], None], timeout_s: float | None = None
) -> records.Outcome:
    """Runs the jobs, which differ in their lanes alone, one after the other."""
    return await records.run([_READER], on_record, stdin=msgspec.json.encode(jobs), timeout_s=timeout_s)
