"""The batch scripts of deploy/slurm, submitted to a real Slurm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy import slurm
from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, wait_for
from tests.e2e.test_failures import Stream
from tests.ports import free_port, free_ports

DEPLOY = Path(__file__).parents[2] / "deploy" / "slurm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"Slurm is not installed: {slurm.missing()} (tests/packages.sh)"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    running = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.close()


class Job:
    """A job of a batch script, with a tiny model on cores; and its router, as a client sees it."""

    model = "model"

    def __init__(self, cluster: slurm.Slurm, script: str, directory: Path, *flags: str, **environ: str) -> None:
        self._cluster = cluster
        self.directory = directory
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environ |= {
            "PD_SERVE": f"{sys.executable} -m pd_serve.cli",
            "PD_DEPLOY": str(DEPLOY),
            "PD_MODEL": str(tiny_model.write(directory / self.model)),
            "PD_ADDRESS": "127.0.0.1",  # the names of these nodes are known to Slurm alone
            "PD_ROUTER_PORT": str(port),
            "PD_NODE_PORT": str(free_ports(4)),
            "PD_RUN_DIR": str(directory),
            "NODE_FLAGS": "--device cpu --dtype float32 --threads 1 --kv-cache-memory 32MiB",
            "ROUTER_FLAGS": "--log-level debug",
        }
        command = ["sbatch", "--parsable", f"--chdir={directory}", f"--output={directory}/batch.log", *flags]
        self.id = cluster.run(*command, str(DEPLOY / script), **environ).strip()
        assert self.id.isdigit(), self.id
        self.run_directory = directory / f"pd-serve-{self.id}"

    @property
    def log(self) -> str:
        path = self.directory / "batch.log"
        return path.read_text() if path.exists() else ""

    def wait_ready(self) -> None:
        wait_for(lambda: f"ready: {self.url}" in self.log, 100, f"ready; {self.log}")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for log in [self.directory / "batch.log", *sorted(self.run_directory.glob("*.log"))]:
                print(f"--- {log.name}\n{log.read_text()[-3000:] if log.exists() else '(is not there)'}")
            self._cluster.run("scancel", "--full", self.id)

    def left(self) -> list[str]:
        """Command lines of processes that this job left behind."""
        return [" ".join(process.info["cmdline"]) for process in self.processes()]

    def processes(self) -> list[psutil.Process]:
        """Of pd-serve, of this job."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if str(self.run_directory / "secret") in (process.info["cmdline"] or ())
        ]


def test_a_requeued_job_answers_and_a_stream_outlives_the_order_to_end(cluster: slurm.Slurm, tmp_path: Path) -> None:
    with Job(cluster, "pd-serve.sbatch", tmp_path, "--nodes=3") as job:
        secret = job.run_directory / "secret"
        wait_for(lambda: len(job.left()) == 3, 20, "three processes")
        first, before = secret.read_text(), {process.pid for process in job.processes()}
        cluster.run("scontrol", "requeue", job.id)  # as after the failure of a host: all of it ends at once
        job.wait_ready()
        assert "Restarts=1" in cluster.run("scontrol", "show", "job", job.id)
        assert secret.read_text() != first and not before & {process.pid for process in job.processes()}
        assert secret.stat().st_mode & 0o777 == 0o600
        assert (job.run_directory / "url").read_text().strip() == job.url
        answer = HTTP.post(f"{job.url}/v1/completions", json={"model": job.model, "prompt": "Hello", "max_tokens": 5})
        assert answer.status_code == 200, answer.text
        assert len(job.left()) == 3

        stream = Stream(job, "Once upon a time", max_tokens=900)  # type: ignore[arg-type]
        wait_for(lambda: len(stream.tokens) > 3, 20, "tokens")
        cluster.run("scancel", job.id)  # TERM to all of it at once, and a kill after 30 s
        assert stream.wait(30).error is None
        assert len(stream.tokens) == 900
        wait_for(lambda: not cluster.jobs(), 30, f"the end of the job: {cluster.jobs()}")
        assert not job.left()
        logs = {path.name: path.read_text() for path in job.run_directory.glob("*.log")}
        assert set(logs) == {"router.log", "prefill-0.log", "decode-0.log"}
        assert not any("Traceback" in log or "cannot register" in log for log in logs.values())


def test_a_node_that_dies_is_started_again_and_both_groups_drain(cluster: slurm.Slurm, tmp_path: Path) -> None:
    with Job(cluster, "pd-serve-het.sbatch", tmp_path) as job:
        job.wait_ready()
        (decode,) = (process for process in job.processes() if "decode" in process.info["cmdline"])
        decode.kill()
        wait_for(lambda: "decode-0 ended with status" in job.log, 20, "the death")
        wait_for(
            lambda: HTTP.get(job.url + "/ready").status_code == 200 and len(job.left()) == 3, 40, "another decode node"
        )
        stream = Stream(job, "Once upon a time", max_tokens=300)  # type: ignore[arg-type]
        wait_for(lambda: len(stream.tokens) > 3, 20, "tokens")
        cluster.run("scancel", "--batch", "--signal=TERM", job.id)  # to the groups' steps, by the first one's script
        assert stream.wait(30).error is None and len(stream.tokens) == 300
        wait_for(lambda: not cluster.jobs() and not job.left(), 30, "the end of the job")
        assert "draining" in job.log and "all ended" in job.log and job.log.count("ended with status 0") == 3
        assert not (job.run_directory / "secret").exists()
