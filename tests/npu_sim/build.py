"""Make the simulation on demand: an environment of its own with the real torch_npu wheel, and the stand-in libraries.

    python tests/npu_sim/build.py       makes what is missing and prints what to export

Everything lies in `.npu_sim/` beside the sources and is made once: about a minute and 1.5 GB where pip finds a CPU
build of torch (PIP_EXTRA_INDEX_URL names an index that has one; else the build with CUDA comes, several GB). The
environment is apart from the project's because torch_npu changes torch by being imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.npu_sim.stubs import write_stubs  # noqa: E402

WHEELS = ("torch==2.13.0", "torch_npu==2.13.0")  # the versions of the extra `npu` in pyproject.toml
SOURCES = ("cann_runtime.c", "cann_operators.c", "cann_hccl.c")
# What the wheel links with. All six are one library here.
LIBRARIES = ("libascendcl", "libhccl", "libacl_op_compiler", "libacl_tdt_channel", "libge_runner", "libgraph")
_INSTALL_TIMEOUT_S = 1200


class Unavailable(Exception):
    """The simulation cannot be made on this machine; the text says why in a line."""


@dataclass(frozen=True)
class Simulation:
    """Where the environment's Python and the stand-in libraries are."""

    python: Path
    libraries: Path

    def environ(self, devices: int = 2, **more: str) -> dict[str, str]:
        """Return the variables for a process that shall see that many devices; the libraries stand for set_env.sh."""
        return {
            "LD_LIBRARY_PATH": str(self.libraries),
            "NPU_SIM_DEVICES": str(devices),
            "TASK_QUEUE_ENABLE": "0",  # kernels run when they are called: cpu_kernels.py reads the memory at once
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # as job scripts export it, for torchrun's own process
            **more,
        }


def prepare(folder: Path = ROOT / ".npu_sim") -> Simulation:
    """Make what is missing of the simulation and return it; several processes may call this at once.

    Raises:
        Unavailable: another processor than x86_64, no C compiler, or the wheels cannot be installed.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"it needs Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"it needs a C compiler and binutils: there is no `{tool}`")
    folder.mkdir(exist_ok=True)
    with _locked(folder / "lock"):
        simulation = Simulation(folder / "venv" / "bin" / "python", folder / "lib")
        requirements = [*WHEELS, *_dependencies()]
        if _is_new(folder / "venv.stamp", sys.version, *requirements):
            _install(folder / "venv", requirements)
            _stamp(folder / "venv.stamp", sys.version, *requirements)
        sources = [path.read_text() for path in [*sorted(HERE.glob("*.[ch]")), HERE / "stubs.py", HERE / "build.py"]]
        if _is_new(folder / "lib.stamp", sys.version, *requirements, *sources):
            _compile(simulation)
            _stamp(folder / "lib.stamp", sys.version, *requirements, *sources)
    return simulation


def _dependencies() -> list[str]:
    """Return what pyproject.toml requires, less torch."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest brings it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [requirement for requirement in project["dependencies"] if not requirement.startswith("torch>")]


def _install(venv: Path, requirements: list[str]) -> None:
    shutil.rmtree(venv, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(venv)], "no virtual environment can be made")
    # The pip outside of all environments, as scripts/setup.sh does: not every Python can put one into its own.
    pip = [getattr(sys, "_base_executable", sys.executable), "-m", "pip", "--python", str(venv / "bin" / "python")]
    words = [*pip, "install", "--quiet", "--disable-pip-version-check", *requirements]
    _run(words, f"{', '.join(WHEELS)} cannot be installed")


def _compile(simulation: Simulation) -> None:
    """Compile the stand-ins against the headers in the wheel, and give the one library its six names."""
    packages = Path(sysconfig.get_path("platlib", vars={"platbase": str(simulation.python.parents[1])}))
    wheel = packages / "torch_npu"
    include = [f"-I{wheel / 'include'}", f"-I{wheel / 'include/third_party/acl/inc'}", f"-I{HERE}"]
    library = simulation.libraries
    shutil.rmtree(library, ignore_errors=True)
    library.mkdir()
    objects = [library / f"{Path(source).stem}.o" for source in SOURCES]
    # A stand-in has the parameters of the real function and seldom uses all of them.
    strict = ["-std=gnu11", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    for source, made in zip(SOURCES, objects):
        _run(["cc", *strict, *include, "-c", str(HERE / source), "-o", str(made)], f"{source} does not compile")
    stubs = library / "stubs.c"
    write_stubs(stubs, _wheel_libraries(wheel), [*objects, *_other_libraries(packages)])
    words = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o", str(library / "libcann_sim.so")]
    _run([*words, *map(str, objects), str(stubs), "-lrt"], "the stand-in library does not link")
    for name in LIBRARIES:
        (library / f"{name}.so").symlink_to("libcann_sim.so")


def _wheel_libraries(wheel: Path) -> list[Path]:
    return [*wheel.glob("lib/libtorch_npu.so"), *wheel.glob("lib/libtensorpipe.so"), *wheel.glob("_C*.so")]


def _other_libraries(packages: Path) -> list[Path]:
    """List the libraries that provide the rest of what the wheel needs: torch, C, C++, Python."""
    system = ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "libstdc++.so.6")
    folders = [Path("/lib"), Path("/usr/lib"), Path("/lib64"), Path("/usr/lib64")]
    found = [path for folder in folders for name in system for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
    python = [*Path(sys.base_prefix, "lib").glob("libpython3*.so*"), Path(sys.executable).resolve()]
    return [*packages.glob("torch/lib/*.so*"), *found, *python]


def _run(words: list[str], problem: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{problem}: no end after {_INSTALL_TIMEOUT_S} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(f"{problem}: {' / '.join(said[-3:])}")


def _digest(parts: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_new(stamp: Path, *parts: str) -> bool:
    return not stamp.exists() or stamp.read_text() != _digest(parts)


def _stamp(stamp: Path, *parts: str) -> None:
    stamp.write_text(_digest(parts))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        made = prepare()
    except Unavailable as reason:
        raise SystemExit(f"npu-sim: {reason}") from None
    print(f"# {made.python}")
    print(*(f"export {name}={value}" for name, value in made.environ().items()), sep=os.linesep)
