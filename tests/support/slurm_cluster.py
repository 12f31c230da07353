"""A private Slurm cluster on loopback: real munged, slurmctld and slurmds, with their own folders, ports and keys."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scancel", "scontrol", "squeue", "srun", "sinfo")

_CONF = """\
ClusterName=safelight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=20
MpiDefault=none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class CannotStart(Exception):
    """Why there is no cluster on this machine."""


def missing() -> str | None:
    """Why a cluster cannot be tried here; None when it can."""
    absent = [name for name in (*DAEMONS, *COMMANDS) if _which(name) is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)} (Debian: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd starts jobs of other users: only root can run one"


class SlurmCluster:
    """`nodes` slurmds of four CPUs each, all on this host."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Raises CannotStart."""
        ports = free_ports(1 + self.nodes)
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"
            for i, port in enumerate(ports[1:])
        )
        conf = _CONF.format(host=host, folder=self.folder, ctld_port=ports[0], nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used; found without systemd
        self.folder.chmod(0o711)  # munged wants its socket to be reachable for everyone
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "seed-file", "log-file")]
        self._daemon("munged", "--foreground", f"--key-file={key}", f"--socket={self.folder}/munge.socket", *munge)
        _wait(lambda: (self.folder / "munge.socket").exists(), 10, self._why)
        self._daemon("slurmctld", "-D")
        for i in range(self.nodes):
            (self.folder / f"spool-n{i}").mkdir()
            self._daemon("slurmd", "-D", "-N", f"n{i}")
        _wait(lambda: self.ask("sinfo", "-h", "-p", "low", "-o", "%T %D") == f"idle {self.nodes}", 30, self._why)

    def ask(self, *command: str) -> str:
        """The output of a Slurm command; what went wrong reads as an empty string."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30).stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of all tasks of an array, those that are unlike, sorted."""
        return " ".join(sorted(set(self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split())))

    def wait(self, job: str, accept: Callable[[str], bool], timeout_s: float = 60.0) -> str:
        """Waits for a state of the job."""
        _wait(lambda: accept(self.state(job)), timeout_s, lambda: f"job {job} is {self.state(job)}\n{self._why()}")
        return self.state(job)

    def stop(self) -> None:
        """Ends jobs and daemons, the controller last but munged."""
        self.ask("scancel", "--signal=KILL", "--full", "--state=RUNNING", "--user=root")
        self.ask("scancel", "--user=root")
        with contextlib.suppress(CannotStart):
            _wait(lambda: not self.ask("squeue", "-h"), 15, self._why)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _daemon(self, *command: str) -> None:
        path = _which(command[0])
        assert path is not None, "checked by missing()"
        with (self.folder / f"{command[0]}.err").open("ab") as log:
            started = subprocess.Popen([path, *command[1:]], env=self.environment, stdout=log, stderr=log)
        self._daemons.append(started)

    def _why(self) -> str:
        logs = sorted(self.folder.glob("*.err")) + sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@contextmanager
def running_cluster(folder: Path, nodes: int = 1) -> Iterator[SlurmCluster]:
    """A started cluster; nothing of it is left. Raises CannotStart."""
    cluster = SlurmCluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _wait(reached: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise CannotStart(why())
        time.sleep(0.1)
