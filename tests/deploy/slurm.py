"""A Slurm cluster of three nodes on 127.0.0.1, for as long as a test lasts: munge, controller and node daemons of
Debian's packages, with their files in a folder of the test.

A requeued job begins again when its credential has expired: after 5 s here, 120 by default."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.e2e.cluster import wait_for
from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol", "sinfo")
NODES = ("n1", "n2", "n3")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
SlurmdSpoolDir={directory}/spool-%n
StateSaveLocation={directory}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP OverSubscribe=NO
"""


def missing() -> str:
    """The programs that are not installed."""
    paths = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=paths) is None)


class Slurm:
    """Three idle nodes once it is made. ``environ`` is for its commands."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environ = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")),
        }
        key = directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        directory.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=2000"
            for name in NODES
        )
        (directory / "slurm.conf").write_text(
            CONF.format(host=host, user=getpass.getuser(), directory=directory, port=free_port(), nodes=nodes)
        )
        try:
            munge = ["munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2"]
            munge += [f"--{name}={directory}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
            munge += [f"--{name}={directory}/munge.{end}" for name, end in (("log-file", "log"), ("seed-file", "seed"))]
            self._start(*munge)
            wait_for((directory / "munge.sock").exists, 10, "munge")
            self._start("slurmctld", "-D")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 3, 30, "three idle nodes")
        except BaseException:
            self.close()
            raise

    def _start(self, *command: str) -> None:
        with (self._directory / f"{command[0]}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environ)
            )

    def run(self, *command: str, **environ: str) -> str:
        """What it prints; "" where it fails, as before the controller listens."""
        answer = subprocess.run(
            command, env=self.environ | environ, capture_output=True, text=True, timeout=30, check=False
        )
        return answer.stdout if answer.returncode == 0 else ""

    def jobs(self) -> str:
        return self.run("squeue", "-h", "-o", "%i %T")

    def close(self) -> None:
        if self._daemons:
            self.run("scancel", "--full", f"--user={getpass.getuser()}")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
