"""Real servers of vLLM (CPU build) on this machine, each a process group that is killed whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port

NAME = "smollm2"
NIXL = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}
OURS = {
    "kv_connector": "PdServeConnector",
    "kv_connector_module_path": "pd_serve.integrations.vllm",
    "kv_load_failure_policy": "recompute",
}
HERE = {"PYTHONPATH": str(Path(__file__).parents[2])}


def behind_the_router() -> dict[str, str]:
    """NixlConnector; where it does not start on CPUs, as vLLM's own of 0.24, ours."""
    return OURS if Path(os.environ["PEER_VENV"]).name.startswith("0.24.") else NIXL


def scale_out() -> list[str]:
    """What opens /inference/v1/generate, where vLLM has to be asked to: 0.24 has it open."""
    routers = Path(os.environ["PEER_VENV"]).glob("lib/python3*/site-packages/vllm/entrypoints/scale_out/factories.py")
    return ["--enable-scale-out"] if any("--enable-scale-out" in file.read_text() for file in routers) else []


class Server:
    """``connector``: of ``--kv-transfer-config``; its side channel gets a port of its own."""

    def __init__(
        self,
        model: Path,
        log: Path,
        connector: Mapping[str, Any] | None,
        arguments: Sequence[str] = (),
    ) -> None:
        venv = Path(os.environ["PEER_VENV"])
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        given = [] if connector is None else ["--kv-transfer-config", json.dumps(dict(connector))]
        command = [
            str(venv / "bin" / "vllm"), "serve", str(model), "--served-model-name", NAME, "--host", "127.0.0.1",
            "--port", str(self.port), "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager",
            "--kv-cache-memory-bytes", str(512 << 20), *given, *arguments,
        ]  # fmt: skip
        variables = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **HERE, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        iomp = venv / "lib" / "libiomp5.so"
        if iomp.exists():
            variables["LD_PRELOAD"] = str(iomp)
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env={**inherited, **variables}
            )

    def wait(self, timeout_s: float = 400.0) -> None:
        """Until it is healthy. Raises AssertionError with the end of its log."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            alive = self._process.poll() is None and time.monotonic() < deadline_s
            assert alive, f"{self.log}:\n{self.log.read_text(errors='replace')[-4000:]}"
            time.sleep(0.5)
        self._unpin()

    def _unpin(self) -> None:
        """vLLM 0.32 with NIXL on CPUs puts every worker on the same core."""
        cores = range(os.cpu_count() or 1)
        for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(task.parts[2])) == self._process.pid:
                    os.sched_setaffinity(int(task.name), cores)

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=20, trust_env=False).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It answers nothing meanwhile, and goes on after it."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
