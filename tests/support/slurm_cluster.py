"""A real Slurm on this host for the length of a `with` block: munged, slurmctld and one slurmd for each virtual node.

Everything it writes is in one folder, and everything it started is gone when the block ends. It needs root and the
programs of Debian's packages `slurm-wlm` and `munge`; nothing of them may run already, nothing in /etc is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
_READY_S = 20

# cred_expire is also how long Slurm makes a job wait that was queued again: 120 s by default, 5 s at least. KillWait is
# what processes get between TERM and KILL. linuxproc and task/none, because a container lends no control groups.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=2
MpiDefault=none
MailProg=/bin/true
KillWait=20
SlurmdParameters=config_overrides
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class SlurmCluster:
    """Talk to a running cluster; `environ` makes any Slurm program find it."""

    folder: Path
    environ: dict[str, str]

    def call(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run a Slurm program and return what it prints."""
        done = subprocess.run(
            list(map(str, words)), env=self.environ, cwd=cwd or self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *, cwd: Path) -> str:
        """Queue a job script as a person in the folder `cwd` would; returns the job's number."""
        return self.call("sbatch", "--parsable", script, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job: JobState, Restarts, ExitCode and so on."""
        words = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, number: str, *, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job neither runs nor waits to run."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: self.job(number)["JobState"] in over, f"job {number} is over", timeout_s=timeout_s)
        return self.job(number)


def missing_programs() -> list[str]:
    """Name the programs that are not installed (sbin folders are searched even if PATH leaves them out)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextmanager
def slurm_cluster(folder: Path, *, nodes: int = 2, cpus: int = 2) -> Iterator[SlurmCluster]:
    """Run a cluster of virtual nodes on this host, all in `folder`; it is ready when the block begins."""
    # Jobs inherit it. Threads that wait sleep: by default they spin, and all nodes share the cores of this host.
    own = {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf"), "OMP_WAIT_POLICY": "passive"}
    cluster = SlurmCluster(folder, {**os.environ, **own})
    _write_configuration(folder, nodes, cpus)
    with ExitStack() as started:
        started.enter_context(_daemon(cluster, "munged", "--force", "--foreground", *_munge_files(folder)))
        wait_until((folder / "munge.socket").exists, "munged listens")
        started.enter_context(_daemon(cluster, "slurmctld", "-D"))
        for node in range(nodes):
            started.enter_context(_daemon(cluster, "slurmd", "-D", "-N", f"n{node}"))
        try:
            wait_until(lambda: _idle_nodes(cluster) == nodes, f"{nodes} nodes are idle")
            yield cluster
        finally:
            _cancel_all(cluster)


def wait_until(is_true: Callable[[], bool], what: str, *, timeout_s: float = _READY_S) -> None:
    """Look ten times a second, and fail the test when the time is over."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def _write_configuration(folder: Path, nodes: int, cpus: int) -> None:
    ports = _free_ports(nodes + 1)
    lines = [f"NodeName=n{i} NodeAddr=127.0.0.1 Port={ports[i + 1]} CPUs={cpus}" for i in range(nodes)]
    text = _CONF.format(folder=folder, host=socket.gethostname(), ports=ports)
    (folder / "slurm.conf").write_text(text + "\n".join(lines) + "\n")
    (folder / "state").mkdir()
    for node in range(nodes):
        (folder / f"spool-n{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def _munge_files(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _daemon(cluster: SlurmCluster, name: str, *words: str) -> Iterator[None]:
    program = shutil.which(name, path=_path())
    assert program is not None, f"{name} is not installed"
    with (cluster.folder / f"{name}{words[-1][-3:]}.out").open("w") as output:
        process = subprocess.Popen(
            [program, *words], env=cluster.environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(cluster: SlurmCluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"], env=cluster.environ, capture_output=True, text=True
    )
    return done.stdout.split().count("idle")


def _cancel_all(cluster: SlurmCluster) -> None:
    """End the jobs that a failed test left, so that no process of theirs outlives the daemons."""
    if jobs := cluster.call("squeue", "--noheader", "--format=%i").split():
        cluster.call("scancel", "--signal=KILL", "--full", *jobs)
        wait_until(lambda: not cluster.call("squeue", "--noheader", "--format=%i"), "no job is left")
