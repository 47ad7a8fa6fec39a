"""Processes of ``pd-serve`` as forks of one that has imported everything: importing is most of a short life's work.

Tests that are not about starting get their nodes and routers here, and nodes get their engines. What runs in them is
what ``python -m`` runs; each is a process of its own, with its own files, variables and signals, and whoever started
it is its parent. :func:`start` is the tests' end, the rest runs in the nursery's processes. Never used by ``up``,
deployments and the command line's own tests: those start as users' do.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from pd_serve import processes

PRELOADED = (
    "torch",
    "nixl_cu13._bindings",
    "pd_serve.cli",
    "pd_serve.router.main",
    "pd_serve.router.app",
    "pd_serve.node.main",
    "pd_serve.node.server",
    "pd_serve.engine.__main__",
    "pd_serve.engine.core",
    "pd_serve.engine.ranks",
    "pd_serve.engine.scheduler",
    "pd_serve.engine.worker",
    "pd_serve.compute.cpu.executor",
    "pd_serve.kv.manager",
    "pd_serve.models.decoder",
    "pd_serve.transfer.nixl",
)
_FRAME_BYTES = 1 << 20


# --- the tests' end ------------------------------------------------------------------------------------------------


class Started:
    """A process of the nursery, with the part of :class:`subprocess.Popen` that tests use."""

    def __init__(self, nursery: _Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._pidfd = os.pidfd_open(pid)  # it is not reaped before _collect

    def poll(self) -> int | None:
        return self._collect(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._collect(None if timeout is None else timeout * 1000)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _collect(self, timeout_ms: float | None) -> int | None:
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._pidfd, select.POLLIN)
            if ended.poll(timeout_ms):
                with self._nursery.lock:
                    if self.returncode is None:
                        self.returncode = self._nursery.ask({"reap": self.pid})
                        os.close(self._pidfd)
        return self.returncode


class _Nursery:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(other.fileno())], pass_fds=[other.fileno()], env=environ
            )
        atexit.register(self._end)

    def ask(self, request: dict[str, Any]) -> int:
        with self.lock:
            self._socket.send(json.dumps(request).encode())
            answer = self._socket.recv(64)
        if not answer:
            raise RuntimeError("the nursery of test processes has ended: see its output above")
        return int(answer)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait(10)


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()


def start(module: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> Started:
    """``python -m module arguments``, its output goes to ``log``. ``environ``: all its variables, if not ours.

    They come too late for what is read when a module is imported, and for the interpreter.
    """
    return _start([module, *arguments], log, log, environ)


def run(
    module: str, arguments: Sequence[str], environ: Mapping[str, str] | None = None, *, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` to its end, with what it wrote. Raises TimeoutExpired, and has killed it then."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        process = _start([module, *arguments], out, errors, environ)
        try:
            status = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(arguments, status, out.read_text(), errors.read_text())


def _start(arguments: list[str], out: Path, errors: Path, environ: Mapping[str, str] | None) -> Started:
    outputs = [str(out), str(errors)]
    environ = dict(os.environ if environ is None else environ)
    request = {"arguments": arguments, "outputs": outputs, "environ": environ, "cwd": str(Path.cwd())}
    return Started(_nursery(), _nursery().ask(request))


# --- in the nursery ------------------------------------------------------------------------------------------------


def _serve(link: socket.socket) -> None:
    """Forks and reaps as it is asked to, until the tests' process ends."""
    while request := link.recv(_FRAME_BYTES):
        order = json.loads(request)
        if "reap" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _be_started(order)
        link.send(str(answer).encode())


def _be_started(order: dict[str, Any]) -> NoReturn:
    for number, path in enumerate(order["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    _become(order["arguments"], order["environ"])


def _become(arguments: Sequence[str], environ: Mapping[str, str], fds: Collection[int] = ()) -> NoReturn:
    """What a new interpreter does for ``python -m arguments``, in a fork. Descriptors 0 to 2 are set already."""
    gc.freeze()  # what was the parent's is never collected: closing it here would be felt there
    atexit._clear()
    kept = sorted({0, 1, 2, *fds})
    for low, high in itertools.pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
        os.closerange(low + 1, high)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    asyncio._set_running_loop(None)
    os.environ.clear()
    os.environ.update(environ)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = list(arguments)
    processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _Fork})  # type: ignore[assignment]
    sys.modules.pop(arguments[0] + ".__main__", None)
    if not hasattr(sys.modules.get(arguments[0]), "__path__"):  # of a package, __main__ is what runs
        sys.modules.pop(arguments[0], None)
    status = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Fork:
    """What :class:`pd_serve.processes.Child` needs of :class:`subprocess.Popen`, for ``python -m MODULE``."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None,
        stdin: int,
        stdout: int | None,
        stderr: int | None,
        start_new_session: bool,
        pass_fds: Collection[int],
        preexec_fn: Callable[[], None],
    ) -> None:
        assert list(arguments[:2]) == [sys.executable, "-m"] and start_new_session
        self.returncode: int | None = None
        self.stdout: IO[bytes] | None = None
        output = -1
        if stdout == subprocess.PIPE:
            assert stderr == subprocess.STDOUT
            heard, output = os.pipe()
            self.stdout = os.fdopen(heard, "rb")
        self.stdin: IO[bytes] | None = None
        if stdin == subprocess.PIPE:
            source, sink = os.pipe()
            self.stdin = os.fdopen(sink, "wb")
        else:
            source = os.open(os.devnull, os.O_RDONLY)
        environ = dict(os.environ if env is None else env)
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.dup2(source, 0)
            if output >= 0:
                os.dup2(output, 1)
                os.dup2(output, 2)
            preexec_fn()
            _become(arguments[2:], environ, pass_fds)
        os.close(source)
        if output >= 0:
            os.close(output)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        status = self._reap(0)
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def main() -> None:
    from pd_serve.engine.boot import bound_caches

    bound_caches()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as link:
        _serve(link)


if __name__ == "__main__":
    main()
