"""Processes of ``pd-serve`` as forks of one that has imported everything: importing is most of a short life's work.

Tests that are not about starting get their nodes and routers here, and nodes get their engines. What runs in them is
what ``python -m`` runs; each is a process of its own, with its own files, variables and signals, and whoever started
it is its parent. :func:`start` is the tests' end, the rest runs in the nursery's processes. Never used by ``up``,
deployments and the command line's own tests: those start as users' do.

There is one nursery for all of pytest's workers, which are forks of it themselves (:mod:`tests.worker`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
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
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any, NoReturn

from pd_serve import processes

PRELOADED = (
    "torch",
    "httpx",
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
FOR_WORKERS = ("pytest", "hypothesis", "gguf", "llguidance", "opentelemetry.sdk.trace", "typer.testing", "rich.table")
ADDRESS = "TESTS_NURSERY"  # the variable with the name of its socket
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
    """A way to the nursery: to the one at :data:`ADDRESS`, or to our own, which ends with us."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if address := os.environ.get(ADDRESS):
            self._socket.connect("\0" + address)
            return
        address = f"pd-serve-tests-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.bind("\0" + address)
            door.listen()
            self._socket.connect("\0" + address)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(door.fileno())],
                pass_fds=[door.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.environ[ADDRESS] = address
        atexit.register(self._end, process)

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> int:
        """``fds``: what a fork of a worker has as its descriptors 0, 1, 2."""
        with self.lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            answer = self._socket.recv(64)
        if not answer:
            raise RuntimeError("the nursery of test processes has ended: see its output above")
        return int(answer)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        os.environ.pop(ADDRESS, None)
        self._socket.close()
        process.wait(10)


@functools.cache
def open_nursery() -> _Nursery:
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
    return Started(open_nursery(), open_nursery().ask(request))


# --- in the nursery ------------------------------------------------------------------------------------------------


def _serve(door: socket.socket) -> None:
    """Forks and reaps as it is asked to, until the process that started it ends."""
    first = door.accept()[0]
    links = [first]
    while first in links:
        for link in select.select([door, *links], [], [])[0]:
            if link is door:
                links += _let_in(door)
                continue
            try:
                request, fds, *_ = socket.recv_fds(link, _FRAME_BYTES, 3)
                if request:
                    link.send(str(_done(json.loads(request), fds)).encode())
                    continue
            except ConnectionError:
                pass
            links.remove(link)
            link.close()


def _let_in(door: socket.socket) -> list[socket.socket]:
    """Whoever knocks, if it is of our user: others may not have us run what they like."""
    link = door.accept()[0]
    _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user == os.getuid():
        return [link]
    link.close()
    return []


def _done(order: dict[str, Any], fds: list[int]) -> int:
    """The status of a process that has ended, or the number of a new one. ``fds`` are closed."""
    if "reap" in order:
        return os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
    if "code" in order:
        _preload(FOR_WORKERS)
    else:
        _load_kernels()
    child = os.fork()
    if not child:
        fds = fds or [
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for path in order["outputs"]),
        ]
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.chdir(order["cwd"])
        if "code" in order:
            _become_worker(order["code"], order["environ"])
        _become(order["arguments"], order["environ"])
    for fd in fds:
        os.close(fd)
    return child


@functools.cache
def _load_kernels() -> None:
    """Those of a model in float32 that tests start most: each engine would take a fifth of a second to have them.

    They are taken from numba's cache, or compiled, as in an engine. No thread is left, of which a fork would have none.
    """
    import torch

    from pd_serve.compute.cpu import ops
    from pd_serve.compute.cpu.runner import Runner
    from pd_serve.compute.cpu.sampler import Sampler
    from pd_serve.kv.layout import KVLayout
    from pd_serve.memory.pool import HostPool
    from pd_serve.models.config import ModelConfig
    from pd_serve.models.decoder import load_decoder
    from tests.e2e import tiny_model

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        directory = tiny_model.write(Path(folder), dataclasses.replace(tiny_model.SMALL, hidden=64, layers=1))
        model = ModelConfig.from_directory(directory, "")
        layout = KVLayout(16, "float32", model.layer_groups())
        pool = HostPool(layout, (2,))
        decoder = load_decoder(directory, model, "float32", ops=ops, max_positions=64)
        Runner(decoder, model, layout, pool.tensors(), threads=1).warm_up()
        Sampler(model.vocab_size).warm_up()


def _begin_anew(environ: Mapping[str, str], fds: Collection[int] = ()) -> None:
    """Leaves in a fork what a new interpreter has. Descriptors 0 to 2 are set already; ``fds`` stay open, too."""
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


def _become(arguments: Sequence[str], environ: Mapping[str, str], fds: Collection[int] = ()) -> NoReturn:
    """What a new interpreter does for ``python -m arguments``, in a fork."""
    _begin_anew(environ, fds)
    sys.argv = list(arguments)
    processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _Fork})  # type: ignore[assignment]
    if arguments[0] == "pd_serve.cli":
        from pd_serve import cli

        cli.app = _command_line()
        _run(cli.main)
    sys.modules.pop(arguments[0] + ".__main__", None)
    if not hasattr(sys.modules.get(arguments[0]), "__path__"):  # of a package, __main__ is what runs
        sys.modules.pop(arguments[0], None)
    _run(lambda: runpy.run_module(arguments[0], run_name="__main__", alter_sys=True))


@functools.cache
def _command_line() -> Any:
    """What typer makes of all commands, a tenth of a second at each start."""
    from typer.main import get_command

    from pd_serve import cli

    return get_command(cli.app)


def _become_worker(code: str, environ: Mapping[str, str]) -> NoReturn:
    """What a new interpreter does for ``python -c code``, in a fork."""
    _begin_anew(environ)
    sys.argv = ["-c"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    _run(lambda: exec(code, vars(main)))


def _run(program: Callable[[], object]) -> NoReturn:
    status = 0
    try:
        program()
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


def _preload(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # who needs a package that is not there says so himself
            importlib.import_module(name)


def main() -> None:
    from pd_serve.engine.boot import bound_caches

    bound_caches()
    _preload(PRELOADED)
    _command_line()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who end us
    with socket.socket(fileno=int(sys.argv[1])) as door:
        _serve(door)


if __name__ == "__main__":
    main()
