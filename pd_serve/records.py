"""Records that a child process writes to its standard output, among whatever the libraries in it print.

Work that may hang or crash (a GPU driver, an RDMA library) is done in a child: ``doctor`` runs its checks so, and
``bench transfer`` its two ends. The child calls :func:`claim_stdout` first and :func:`emit` for each record; the parent
calls :func:`run` on its main thread. A record is one line of JSON behind a control character; all else is noise, kept
for the message about a child that died.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pd_serve.processes import Child, describe_exit

_MARK = b"\x1e"  # ASCII's record separator
_READ_BYTES = 1 << 16
_NOISE_LINES = 20
_GRACE_S = 2.0  # for a child that is stopped, to take down what it left in shared memory
_stdout = 1


def claim_stdout() -> None:
    """Child: from here on only records go to standard output, and what libraries print there goes to standard error.

    Both may be one pipe; a record is written in one piece, and the mark tells it from the rest.
    """
    global _stdout
    _stdout = os.dup(1)
    os.dup2(2, 1)


def emit(record: dict[str, Any]) -> None:
    """Child: one record, written at once."""
    line = b"\n" + _MARK + json.dumps(record).encode() + b"\n"
    while line:
        line = line[os.write(_stdout, line) :]


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    status: int
    timed_out: bool
    noise: str  # its last lines that were no records

    def why(self, timeout_s: float) -> str:
        """Words for an end that was not a success."""
        if self.timed_out:
            return f"no answer within {timeout_s:.3g} s"
        last = self.noise.strip().rsplit("\n", 1)[-1].strip()
        return describe_exit(self.status) + (f": {last[:200]}" if last else "")


async def run(
    arguments: Sequence[str],
    on_record: Callable[[dict[str, Any]], None],
    *,
    stdin: bytes = b"",
    timeout_s: float | None = None,
) -> Outcome:
    """Runs ``python -m <arguments>`` to its end, or kills it after ``timeout_s``. It never outlives this call."""
    child = Child([sys.executable, "-m", *arguments], stdin=stdin, capture=True)
    noise: deque[str] = deque(maxlen=_NOISE_LINES)
    timed_out = False
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await _read(child.stdout, noise, on_record)
                await child.wait()
        except TimeoutError:
            timed_out = True
    finally:
        status = await child.stop(_GRACE_S)  # its own children die with it
    return Outcome(status, timed_out, "\n".join(noise))


async def _read(fd: int, noise: deque[str], on_record: Callable[[dict[str, Any]], None]) -> None:
    """Until the other end is closed."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    buffer = b""
    os.set_blocking(fd, False)  # it may be said to be readable once more after all was read
    loop.add_reader(fd, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                data = os.read(fd, _READ_BYTES)
            except BlockingIOError:
                continue
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                _, mark, record = line.partition(_MARK)
                if mark:
                    on_record(json.loads(record))
                elif line.strip():
                    noise.append(line.decode(errors="replace"))
    finally:
        loop.remove_reader(fd)
