"""Memory, limits, names and disks of this host."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from launcher.devices.host_memory import group_limits
from launcher.doctor.finding import Finding, judged

_GIB = 2**30
# File systems that several hosts see. What is not listed is one host's own.
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "glusterfs", "fuse.", "9p", "virtiofs", "dpc")
# Below these a small job fails already.
_LEAST_MEMORY, _LEAST_DISK, _LEAST_SHM = 2 * _GIB, _GIB, 256 * 2**20
_LEAST_FILES = 1024


def memory() -> Iterator[Finding]:
    """Show the memory that is free, and the limit of a container or a batch job's step."""
    found = psutil.virtual_memory()
    yield judged(
        "memory",
        f"{found.available / _GIB:.1f} of {found.total / _GIB:.1f} GiB free",
        "end other programs: the weights of one rank alone take gigabytes",
        is_well=found.available >= _LEAST_MEMORY,
    )
    limit = min(group_limits(), default=found.total)
    if limit < found.total:
        yield Finding("--", "memory of the container", f"at most {limit / _GIB:.1f} GiB")


def limits() -> Iterator[Finding]:
    """Look at the limits that ranks run into."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield judged("open files", f"{soft} (at most {hard})", f"ulimit -n {hard}", is_well=soft >= _LEAST_FILES)
    for name, what, unit in (("RLIMIT_NPROC", "processes", ""), ("RLIMIT_MEMLOCK", "locked memory", " bytes")):
        soft, _ = resource.getrlimit(getattr(resource, name))
        yield Finding("--", what, "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}{unit}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield judged(
            "/dev/shm",
            f"{free / _GIB:.2f} GiB free",
            "docker run --shm-size 1g, or an emptyDir of medium Memory in a pod: ranks exchange data there",
            is_well=free >= _LEAST_SHM,
        )


def names() -> Iterator[Finding]:
    """Check that this host's own name leads somewhere: gloo listens at its address."""
    name = socket.gethostname()
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})
        yield Finding("ok", "host name", f"{name} is {', '.join(found)}")
    except OSError as error:
        fix = f"export GLOO_SOCKET_IFNAME=<interface>, or add {name} to /etc/hosts"
        yield Finding("!!", "host name", f"{name}: {error}", fix)


def disks(folder: Path) -> Iterator[Finding]:
    """Look at the disks of a job's folder, of temporary files and of the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for what, path in (("folder", folder), ("temporary files", Path(tempfile.gettempdir())), ("cache", cache)):
        yield _disk(what, path)


def _disk(what: str, path: Path) -> Finding:
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    kind = _file_system(existing)
    sharing = "shared between hosts" if kind.startswith(_SHARED) else "of this host alone"
    writable = os.access(existing, os.W_OK)
    return judged(
        what,
        f"{path}: {kind}, {sharing}, {free / _GIB:.1f} GiB free" + ("" if writable else ", not writable"),
        "choose a folder on another disk" if writable else "choose a folder that you may write to",
        is_well=free >= _LEAST_DISK and writable,
    )


def _file_system(path: Path) -> str:
    mounts = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    return next((mounts[str(each)] for each in (resolved, *resolved.parents) if str(each) in mounts), "unknown")
