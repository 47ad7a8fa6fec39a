"""Processes of a test in Linux namespaces of their own, as containers are: made by util-linux's ``unshare``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from pathlib import Path

import pytest

PID = ("--pid",)
USER_AND_PID = ("--user", "--map-root-user", "--pid")  # where the machine permits it, without being root


# With --mount, as ``then``: /proc of the new PID namespace, without which CUDA does not start. ``outer_pid`` is kept.
OWN_PROC = (
    "sh",
    "-ec",
    'read -r OUTER_PID _ </proc/self/stat; export OUTER_PID; mount -t proc proc /proc; exec "$@"',
    "sh",
)


def unshare(*alternatives: Sequence[str], then: Sequence[str] = ()) -> list[str]:
    """A command that runs another in new namespaces, by way of ``then``: the first that works. Skips where none does.

    It ends with what it runs, and takes it along when it is killed.
    """
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("needs unshare (util-linux)")
    reasons = []
    for options in alternatives:
        command = [program, *options, "--fork", "--kill-child", *then]
        tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return command
        reasons.append(f"unshare {' '.join(options)}: {tried.stderr.strip()}")
    pytest.skip("; ".join(reasons))


@contextmanager
def spawned_under(command: Sequence[str]) -> Iterator[None]:
    """What ``multiprocessing`` spawns inside runs under ``command``, whose pid is then the process's ``pid``."""
    resource_tracker.ensure_running()  # it is spawned with the first process, and belongs to all of them
    spawn = util.spawnv_passfds

    def spawn_under(path: bytes, args: Sequence[bytes | str], fds: Sequence[int]) -> int:
        return spawn(os.fsencode(command[0]), [*command, *args], fds)

    with pytest.MonkeyPatch.context() as patch:  # set_executable takes a program without arguments only
        if command:
            patch.setattr(util, "spawnv_passfds", spawn_under)
        yield


def outer_pid() -> int:
    """This process's number in the namespace that /proc was mounted in: in a new one, what the others know it by."""
    return int(os.environ.get("OUTER_PID") or str(Path("/proc/self").readlink()))


def namespace(kind: str) -> str:
    """This process's. ``kind``: pid, user, ..."""
    return str(Path(f"/proc/self/ns/{kind}").readlink())
