"""The reader process: starts the sources of one lane, pulls from them in every way that a job asks for, and measures.

``python -m pd_serve.bench.transfer.reader`` with a :class:`Job` on standard input; results are records on standard
output (:mod:`pd_serve.records`), each a dict with a ``kind``: ``opened``, ``case``, ``limit``, ``load``, ``failed``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import signal
import sys
from pathlib import Path

import msgspec

from pd_serve import records
from pd_serve.bench.transfer.job import LIMIT, Job, cases, layouts
from pd_serve.bench.transfer.sources import SourceProcess
from pd_serve.errors import PDServeError


def run(job: Job) -> None:
    """All of the job; results go out as records. Raises PDServeError."""
    source_layouts, reader_layout = layouts(job)
    with contextlib.ExitStack() as stack:
        # before any library starts threads here: see Child
        sources = [SourceProcess(rank, layout) for rank, layout in enumerate(source_layouts)]
        for source in sources:
            stack.callback(source.close)
        # torch takes a second or two to import: both processes do it at the same time
        from pd_serve.bench.transfer.reading import ReaderEnd

        if job.lane == LIMIT:
            from pd_serve.bench.transfer.raw import memcpy_gb_per_s

            rate = memcpy_gb_per_s(job.size_bytes, job.devices if job.cuda else None, job.repeats)
            records.emit({"kind": "limit", "name": "memcpy", "gb_per_s": rate})
        end = ReaderEnd(job, reader_layout, sources)
        stack.callback(end.close)
        records.emit({"kind": "opened", "lane": job.lane})
        if job.lock:
            file = stack.enter_context(Path(job.lock).open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        for case in cases(job):
            if job.lane != LIMIT:
                records.emit(end.measure(case))
            elif not case.scattered:
                rate = end.measure(case)["gb_per_s"]
                records.emit({"kind": "limit", "name": "nixl", "gb_per_s": rate})
        if job.under_load and job.cuda and job.lane != LIMIT:
            from pd_serve.bench.transfer.load import measure_under_load

            for record in measure_under_load(end):
                records.emit(record)


def main() -> None:
    records.claim_stdout()
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        run(job)
    except PDServeError as error:
        records.emit({"kind": "failed", "lane": job.lane, "message": str(error)})
    except Exception as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        records.emit({"kind": "failed", "lane": job.lane, "message": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
