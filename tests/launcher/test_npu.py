"""What is special about NPUs, as far as it can be known without one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.devices import kinds, npu, npu_faults
from launcher.failure.exit_codes import ExitCode, exit_code
from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted

ROOT = Path(__file__).resolve().parents[2]
# Messages as torch_npu prints them, shortened, from public reports of users.
TIMEOUT = """npuSynchronizeDevice:compiler_depend.ts:479 NPU function error: AclrtSynchronize, error code is 507048
[Error]: The execution of the internal task times out.
EI0002: [PID: 7277] The wait execution of the Notify register times out. Reason: The Notify register has not received
the Notify record from remote rank [1]."""
SOCKET = """InnerRunOpApi:OpParamMaker.cpp:281 OPS function error: HcclAllreduce, error code is 6
EI0006: [PID: 1292363] Getting socket times out. Reason: Remote Rank did not send the data in time."""


def test_the_library_that_noticed_first_explains_more_than_the_runtime() -> None:
    error = npu_faults.explain(TIMEOUT)
    assert isinstance(error, DistributedError)
    assert "EI0002" in error.what
    assert "HCCL_EXEC_TIMEOUT" in error.why
    assert len(str(error).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (SOCKET, DistributedError, "EI0006"),
        ("EJ0001: Failed to initialize the HCCP process.", EnvironmentFailure, "wait ten seconds"),
        ("NPU function error: x, error code is 107002", ExplainedError, "bug"),
        ("NPU function error: x, error code is 507014", EnvironmentFailure, "AI Core"),
        ("NPU function error: x, error code is 207001", MemoryExhausted, "--tp_size"),
        ("HCCL function error: hcclCommInit(x), error code is 9", DistributedError, "the other ranks' logs"),
        ("RuntimeError: NPU out of memory. Tried to allocate 3.00 GiB", MemoryExhausted, "--tp_size"),
        ("Resource_Error_Insufficient_Device_Memory(EI0011): Failed to allocate", MemoryExhausted, "--tp_size"),
    ],
)
def test_known_codes_become_errors_for_people(text: str, kind: type, said: str) -> None:
    error = npu_faults.explain(text)
    assert type(error) is kind
    assert said in str(error)


def test_only_an_error_of_hccl_itself_leaves_no_time_to_look_for_its_cause() -> None:
    assert kinds.is_about_to_abort(RuntimeError(TIMEOUT))
    assert kinds.is_about_to_abort(RuntimeError(SOCKET))
    assert not kinds.is_about_to_abort(RuntimeError("NPU out of memory. Tried to allocate 3.00 GiB"))
    assert not kinds.is_about_to_abort(RuntimeError("Connection closed by peer"))
    assert not kinds.is_about_to_abort(DistributedError("rank 1 did not come to merging (EI0002)"))


@pytest.mark.parametrize("text", ["", "size mismatch", "error code is 999999", "EI9999: unknown", "EXIT0002"])
def test_an_unknown_code_is_not_guessed_at(text: str) -> None:
    assert npu_faults.explain(text) is None


def test_every_code_has_all_four_parts_and_an_exit_status() -> None:
    for code, fault in npu_faults.FAULTS.items():
        error = fault.kind(fault.what)
        assert all((fault.what, fault.why, fault.advice)), code
        assert exit_code(error) in set(ExitCode) - {ExitCode.PUBLISHED}


def test_hccl_waits_are_bounded_and_in_their_order() -> None:
    environ: dict[str, str] = {}
    chosen = npu.set_environment_defaults(environ)
    assert chosen == environ == {"HCCL_CONNECT_TIMEOUT": "300", "HCCL_EXEC_TIMEOUT": "600", "HCCL_EVENT_TIMEOUT": "630"}
    assert npu.group_timeout_s(60, environ) == 660  # HCCL, which names the rank, must speak before torch does
    assert npu.group_timeout_s(1800, environ) == 1800


def test_what_the_user_set_for_hccl_stays_and_the_event_timeout_follows_it() -> None:
    environ = {"HCCL_EXEC_TIMEOUT": "1000", "HCCL_CONNECT_TIMEOUT": "120"}
    assert npu.set_environment_defaults(environ) == {"HCCL_EVENT_TIMEOUT": "1030"}
    assert environ["HCCL_EXEC_TIMEOUT"] == "1000"
    endless = {"HCCL_EXEC_TIMEOUT": "0"}  # 0 is never
    npu.set_environment_defaults(endless)
    assert endless["HCCL_EVENT_TIMEOUT"] == "0"


def test_a_timeout_that_is_no_number_is_refused() -> None:
    with pytest.raises(EnvironmentFailure, match="HCCL_EXEC_TIMEOUT=long"):
        npu.set_environment_defaults({"HCCL_EXEC_TIMEOUT": "long"})


def run_python(program: str, *paths: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), str(Path.cwd())])}
    environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_launcher_keeps_torch_from_importing_backends_by_itself(tmp_path: Path) -> None:
    """A machine with the torch_npu wheel but without CANN: `import torch` alone would raise."""
    metadata = installed(tmp_path, TORCH, "libhccl.so: cannot open shared object file") / "torch_npu.dist-info"
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:autoload\n")
    assert "fine" in run_python("import launcher, torch; print('fine')", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):  # the control: without the launcher it does raise
        run_python("import torch", tmp_path)
    message = run_python(LOADING, tmp_path)
    assert "why    libhccl.so: cannot open shared object file" in message
    assert "set_env.sh" in message


def installed(folder: Path, npu_version: str, import_fails_with: str) -> Path:
    """Leave a torch_npu of some version whose import fails with a message."""
    (folder / "torch_npu.py").write_text(f"raise ImportError({import_fails_with!r})\n")
    metadata = folder / "torch_npu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {npu_version}\n")
    return folder


LOADING = "from launcher.devices import npu\ntry: npu.load()\nexcept Exception as error: print(error)"
TORCH = ".".join(version("torch").split("+")[0].split(".")[:3])


def test_a_torch_npu_of_another_version_than_torch_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    message = run_python(LOADING, installed(tmp_path, "2.6.0.post5", "never imported"))
    assert f"error: torch_npu 2.6.0.post5 does not go with torch {version('torch')}" in message
    assert "pip install '.[npu-2.6]'" in message


@pytest.mark.parametrize("suffix", ["", ".post9", "+git1234"])
def test_a_torch_npu_of_the_version_of_torch_is_imported_whatever_follows_the_three_numbers(
    suffix: str, tmp_path: Path
) -> None:
    assert "imported after all" in run_python(LOADING, installed(tmp_path, TORCH + suffix, "imported after all"))


@pytest.mark.parametrize(
    ("said", "why", "advice"),
    [
        ("libascendcl.so: cannot open shared object file: No such file or directory", "belongs to CANN", "set_env.sh"),
        ("libhccl.so: cannot open shared object file: No such file or directory", "belongs to CANN", "set_env.sh"),
        ("libascend_hal.so: cannot open shared object file: No such file", "the NPU's driver", "mount it"),
        ("libtorch_cpu.so: cannot open shared object file: No such file", "another torch", "--force-reinstall"),
        ("libtorch_npu.so: undefined symbol: _ZN3c1011SymIntEv", "another torch", "--force-reinstall"),
        ("libtorch_npu.so: undefined symbol: aclrtGetResInCurrentThread", "another release", "fits the installed CANN"),
        ("No module named 'decorator'", "it needs that package", "pip install"),
        ("something new", "something new", "shows all of it"),
    ],
)
def test_a_failing_import_is_explained_by_its_cause(said: str, why: str, advice: str, tmp_path: Path) -> None:
    message = run_python(LOADING, installed(tmp_path, TORCH, said))
    what, where, reason, attempt = message.splitlines()
    assert (what, where.split()) == (
        "error: torch_npu is installed but cannot be imported",
        ["where", "--device", "npu"],
    )
    assert said in reason
    assert why in reason
    assert advice in attempt
    assert ("set_env.sh" in attempt) == ("belongs to CANN" in why), "setting up the shell helps against nothing else"


def test_every_extra_for_npus_pairs_torch_npu_with_the_torch_of_its_version() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pairs = {name: pair for name, pair in project["optional-dependencies"].items() if name.startswith("npu-")}
    assert list(pairs) == [f"npu-2.{minor}" for minor in range(6, 14)]
    for name, (torch_pin, npu_pin) in pairs.items():
        release = torch_pin.removeprefix("torch==")
        assert release.startswith(f"{name.removeprefix('npu-')}.")
        assert npu_pin == f"torch_npu=={release}.*"
        assert f"`'.[{name}]'`" in (ROOT / "README.md").read_text()


def test_a_job_without_npus_never_imports_torch_npu(tmp_path: Path) -> None:
    """diffusers imports every torch_npu that it finds; where CANN is missing, that would end a `--device cpu` job."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    looking = "import importlib.util; print(importlib.util.find_spec('torch_npu') is not None)"
    assert "True" in run_python(f"import launcher; {looking}", tmp_path)
    assert "False" in run_python(f"import launcher.devices.npu; launcher.devices.npu.hide(); {looking}", tmp_path)


def test_without_torch_npu_the_error_says_what_to_install() -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        npu.load()
    assert "pip install" in caught.value.advice
