"""A Slurm of four nodes on this machine, in folders and namespaces of its own, that leaves nothing behind.

Its processes are a PID namespace that ends with this process, however that ends; each node is one within it. All nodes
are addresses of one network namespace.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NODES = {f"node{i}": f"10.77.0.{10 + i}" for i in range(1, 5)}
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "munged", "unshare", "nsenter", "setpriv", "ip")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(10.77.0.10)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
SchedulerParameters=bf_interval=2,sched_interval=2
MailProg=/bin/true
GresTypes=gpu
NodeName=node[1-4] NodeAddr=10.77.0.[11-14] Port=[7011-7014] CPUs=8 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""
HOLD = """
mount --bind "$0/hosts" /etc/hosts
ip link set lo up
for i in 0 1 2 3 4; do ip address add 10.77.0.1$i/24 dev lo; done
echo ready
read -r _
"""
NODE = 'hostname "$1"; slurmd -D -f "$0/slurm.conf" -N "$1" & while sleep 1; do :; done'
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # ends with it


class Cluster:
    """Its commands, jobs and nodes.

    Attributes:
      folder: of its files and the jobs' output.
      nodes: the running ones; to kill one's process kills all of the node.
    """

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder, self.nodes = folder, dict[str, subprocess.Popen[bytes]]()
        self._enter = ["nsenter", f"--net=/proc/{holder}/ns/net", f"--mount=/proc/{holder}/ns/mnt"]
        self._enter += [f"--pid=/proc/{holder}/ns/pid", f"--wd={Path.cwd()}", "--"]
        self._environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}

    def start(self, *command: str, to: str) -> subprocess.Popen[bytes]:
        with (self.folder / to).open("a") as out:
            return subprocess.Popen(
                [*self._enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
            )

    def start_node(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        command = [*WITH_PARENT, *NAMESPACE, "--uts", "bash", "-c", NODE, str(self.folder), name]
        self.nodes[name] = self.start(*command, to=f"{name}.out")

    def run(self, *command: object, **environment: str) -> str:
        line = [*self._enter, *map(str, command)]
        environment = self._environment | environment
        done = subprocess.run(line, env=environment, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *command: object, **environment: str) -> str:
        """Submits a job with its output in folder/ID.log; returns its id."""
        log = f"--output={self.folder}/%j.log"
        return self.run("sbatch", "--parsable", log, *command, **environment).strip()

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState; of a heterogeneous job, the first component's."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", job))
        assert found
        return found[1]

    def wait(self, job: str, until: Callable[[], object], seconds: float = 600) -> None:
        """Waits until this holds. A job that ends, or the time, is an error."""
        deadline = time.monotonic() + seconds
        while not until():
            ended = self.field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert time.monotonic() < deadline and (not ended or until()), self.report(job)
            time.sleep(1)

    def wait_for(self, job: str, text: str, seconds: float = 600) -> None:
        """Waits until its output has this regular expression."""
        self.wait(job, lambda: re.search(text, self.log(job)), seconds)

    def wait_for_state(self, job: str, state: str, seconds: float = 600) -> None:
        self.wait(job, lambda: self.field(job, "JobState") == state, seconds)

    def report(self, job: str) -> str:
        controller = (self.folder / "slurmctld.log").read_text().splitlines()[-30:]
        return "\n".join([self.run("scontrol", "show", "job", job), *controller, self.log(job)])


def missing() -> str:
    """What this machine lacks to have a cluster, or nothing."""
    absent = [
        name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if absent:
        return f"without {', '.join(absent)}; Debian has it in slurm-wlm and munge"
    if os.geteuid():
        return "slurmd needs root"
    made = subprocess.run([*NAMESPACE, "--net", "true"], check=False)
    return "namespaces may not be made here" if made.returncode else ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts slurmctld and four nodes of eight GPUs, which are no GPUs, and ends them."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    names = {"localhost": "127.0.0.1", socket.gethostname(): "10.77.0.10"} | NODES
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    command = [*NAMESPACE, "--net", "bash", "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdout.readline() == b"ready\n"
        (init,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        made = Cluster(folder, int(init))
        munged = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        munged += [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", "--force"]
        made.run("munged", *munged)
        made.start("slurmctld", "-D", "-f", str(folder / "slurm.conf"), to="slurmctld.out")
        for name in NODES:
            made.start_node(name)
        deadline = time.monotonic() + 60
        while made.run("sinfo", "-h", "-o", "%T %D").strip() != "idle 4":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield made
    finally:
        holder.kill()
        holder.communicate()
