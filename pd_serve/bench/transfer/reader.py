"""The reader process: starts the sources, pulls from them over each lane in every way that a job asks for, measures.

``python -m pd_serve.bench.transfer.reader`` with a list of :class:`Job` on standard input; results are records on
standard output (:mod:`pd_serve.records`), dicts with a ``kind``: ``opened``, ``case``, ``limit``, ``load``, ``failed``.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys

import msgspec

from pd_serve import records
from pd_serve.bench.transfer.job import LIMIT, Job, cases, layouts
from pd_serve.bench.transfer.messages import Close
from pd_serve.bench.transfer.sources import SourceProcess
from pd_serve.errors import PDServeError
from pd_serve.kv.layout import KVLayout


def run(jobs: list[Job]) -> None:
    """All of the jobs; results go out as records, also that one failed."""
    with contextlib.ExitStack() as stack:
        source_layouts, reader_layout = layouts(jobs[0])
        # before any library starts threads here: see Child
        sources = [SourceProcess(rank, layout) for rank, layout in enumerate(source_layouts)]
        for source in sources:
            stack.callback(source.close)
        for number, job in enumerate(jobs):
            try:
                _measure(job, reader_layout, sources)
            except Exception as error:
                logging.getLogger(__name__).debug("failed", exc_info=True)
                message = str(error) if isinstance(error, PDServeError) else f"{type(error).__name__}: {error}"
                records.emit({"kind": "failed", "lane": job.lane, "message": message})
            if number < len(jobs) - 1:
                for source in sources:
                    source.send(Close(again=True))


def _measure(job: Job, layout: KVLayout, sources: list[SourceProcess]) -> None:
    # torch takes a second or two to import: both processes do it at the same time
    from pd_serve.bench.transfer.reading import ReaderEnd

    if job.lane == LIMIT:
        from pd_serve.bench.transfer.raw import memcpy_gb_per_s

        rate = memcpy_gb_per_s(job.size_bytes, job.devices if job.cuda else None, job.repeats)
        records.emit({"kind": "limit", "name": "memcpy", "gb_per_s": rate})
    with contextlib.closing(ReaderEnd(job, layout, sources)) as end:
        records.emit({"kind": "opened", "lane": job.lane})
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
    run(msgspec.json.decode(sys.stdin.buffer.read(), type=list[Job]))


if __name__ == "__main__":
    main()
