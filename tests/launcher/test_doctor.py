"""The doctor says of a machine what is well and what is not, with what to do, and shows no secret."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from launcher.cli.command_line import parse
from launcher.doctor import collective, packages
from launcher.doctor.checks import CHECKS, Asked, examine
from launcher.doctor.collective import cause, try_ranks
from launcher.doctor.finding import Finding, as_json, as_text
from launcher.doctor.host import disks
from launcher.doctor.packages import cann_release
from launcher.doctor.processes import left_over
from launcher.doctor.variables import HARMS, variables
from launcher.failure.liveness import here
from launcher.journal.status import STATUS
from quant_core.errors import ConfigurationError


def marks(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.mark for finding in findings}


def test_this_machine_has_the_packages_that_the_product_asks_for_and_every_check_says_something(tmp_path: Path):
    findings = list(examine(Asked(tmp_path)))
    assert {finding.section for finding in findings} == {section for section, _ in CHECKS}
    assert all(finding.mark == "ok" for finding in findings if finding.what in ("python", "torch", "diffusers", "cpu"))
    assert not [finding for finding in findings if finding.found.startswith("could not look")]
    [ours] = [finding.found for finding in findings if finding.what == "dit-quant-launcher"]
    assert ours == version("dit-quant-launcher")


def test_a_clone_that_is_not_installed_is_told_and_no_trouble(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "_OURS", "a-package-that-nobody-has")
    found = marks(list(packages.packages()))
    assert found["a-package-that-nobody-has"] == "--"
    assert "torch" not in found


def test_a_check_that_fails_is_a_finding_with_a_fix_and_the_others_go_on(tmp_path: Path):
    (tmp_path / STATUS).write_text("[]")
    findings = list(examine(Asked(tmp_path)))
    assert marks(findings)["left over"] == "!!"
    assert all(finding.fix for finding in findings if finding.mark == "!!")
    assert {"memory", "collectives"} <= marks(findings).keys()


SET: dict[str, dict[str, str]] = {
    "HCCL_IF_IP": {"HCCL_IF_IP": "10.0.0.1", "HCCL_SOCKET_IFNAME": "eth0"},
    "RANK_TABLE_FILE": {"RANK_TABLE_FILE": "/etc/ranks.json"},
    "HCCL_WHITELIST_DISABLE": {"HCCL_WHITELIST_DISABLE": "1"},
    "TORCH_HCCL_BLOCKING_WAIT": {"TORCH_HCCL_BLOCKING_WAIT": "1"},
    "HCCL_EVENT_TIMEOUT": {"HCCL_EVENT_TIMEOUT": "600", "HCCL_EXEC_TIMEOUT": "600"},
    "TORCH_DEVICE_BACKEND_AUTOLOAD": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
}


@pytest.mark.parametrize("name", [harm.variable for harm in HARMS])
def test_a_setting_that_does_harm_is_named_with_its_fix(name: str):
    [found] = [finding for finding in variables(SET[name]) if finding.mark == "!!"]
    assert found.what == name
    assert found.fix


def test_settings_that_do_no_harm_are_shown_and_secrets_are_not():
    environ = {"HCCL_EVENT_TIMEOUT": "630", "HCCL_EXEC_TIMEOUT": "600", "HF_TOKEN": "hf_abc", "HOME": "/root"}
    findings = list(variables(environ | {"NCCL_DEBUG": "INFO", "HCCL_WHITELIST_DISABLE": "0"}))
    assert set(marks(findings).values()) == {"ok"}
    assert "HOME" not in marks(findings)
    assert "hf_abc" not in as_text(findings) + as_json(findings)


def test_variables_of_half_a_rank_are_a_trouble():
    assert marks(list(variables({"WORLD_SIZE": "2", "RANK": "0"})))["variables of a rank"] == "!!"


def test_a_rank_whose_starter_is_gone_and_an_account_that_nobody_keeps_are_found(tmp_path: Path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "launcher", "flux"]
    started = subprocess.Popen(
        sleeps, env={**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    )  # by pytest, which starts no ranks
    alone = subprocess.Popen(sleeps)
    rank = {"rank": 0, "host": here(), "pid": 2**22 + 1}  # more than any process has
    (tmp_path / STATUS).write_text(json.dumps({"state": "running", "ranks": [rank]}))
    try:
        found = marks(list(left_over(tmp_path)))
    finally:
        for process in (started, alone):
            process.kill()
            process.wait()
    assert found[f"process {started.pid}"] == "!!"
    assert found[f"process {alone.pid}"] == "--"
    assert found[STATUS] == "!!"


def test_a_process_that_ends_while_it_is_looked_at_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-m", "launcher", "flux"])
    look = psutil.Process.cmdline

    def look_as_it_ends(process: psutil.Process) -> list[str]:
        words = look(process)
        if process.pid == started.pid and started.poll() is None:
            started.kill()
            started.wait()
        return words

    monkeypatch.setattr(psutil.Process, "cmdline", look_as_it_ends)
    try:
        found = marks(list(left_over(tmp_path)))
    finally:
        started.kill()
        started.wait()
    assert f"process {started.pid}" not in found


def test_a_folder_that_may_not_be_written_to_is_a_trouble():
    assert marks(list(disks(Path("/proc/sys/kernel"))))["folder"] == "!!"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=9.1.0\n"),
        ("version.cfg", "toolkit_running_version=[9.1.0]\n"),
    ],
)
def test_the_release_of_cann_is_read_where_it_says_it(file: str, text: str, tmp_path: Path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert cann_release(Path(), tmp_path / "missing", tmp_path) == "9.1.0"


def test_a_device_that_nothing_would_be_tried_on_is_refused():
    with pytest.raises(ConfigurationError, match="--device cpu has no meaning without --ranks"):
        parse(["doctor", "--device", "cpu"])
    assert parse(["doctor", "--device", "cpu", "--ranks", "2"]).options.device == "cpu"


@pytest.mark.distributed
def test_a_rank_that_takes_too_long_is_told_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its first import says which process it is, and sleeps."""
    said = tmp_path / "pid"
    sleeps = f"import os, time\nif 'RANK' in os.environ:\n    open({str(said)!r}, 'w').write(str(os.getpid()))\n"
    (tmp_path / "sitecustomize.py").write_text(f"{sleeps}    time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(collective, "_PATIENCE_S", 12.0)
    [found] = try_ranks(1, "cpu")
    assert (found.mark, found.found) == ("!!", "1 rank on cpu hang")
    rank = int(said.read_text())
    _, alive = psutil.wait_procs([psutil.Process(rank)] if psutil.pid_exists(rank) else [], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


TORCHRUN = """\
W1127 06:33:12 23275 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 1 closing signal SIGTERM
Traceback (most recent call last):
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launcher.doctor.collective FAILED
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            'Traceback (most recent call last):\n  File "a.py", line 1, in main\n    raise EnvironmentFailure(\n'
            "quant_core.errors.EnvironmentFailure: error: cuda 0 does not exist\n  where  local rank 0\n"
            "  why    this process sees none\nTraceback (most recent call last):\n",
            "cuda 0 does not exist; where local rank 0; why this process sees none",
        ),
        ("error: torch_npu is missing\n  try    pip install\n", "torch_npu is missing; try pip install"),
        ("Traceback:\n    raise\nRuntimeError: NCCL 2.1\n", "RuntimeError: NCCL 2.1"),
        ("torch.distributed.DistBackendError: unhandled\n", "torch.distributed.DistBackendError: unhandled"),
    ],
)
def test_ranks_that_failed_are_quoted_and_not_what_torchrun_says_of_them(said: str, told: str):
    assert cause(said + TORCHRUN) == told


def test_ranks_that_said_nothing_leave_the_last_line_there_is():
    assert cause(TORCHRUN) == "launcher.doctor.collective FAILED"
    assert cause("") == "nobody said why"


@pytest.mark.distributed
def test_two_ranks_are_tried_and_a_device_that_is_not_there_is_told():
    [works] = try_ranks(2, "cpu")
    assert (works.mark, "gloo" in works.found) == ("ok", True)
    [fails] = try_ranks(1, "npu")
    assert (fails.mark, "torch_npu" in fails.found) == ("!!", True), fails
    assert shlex.split(fails.fix)[:3] == [sys.executable, "-m", "torch.distributed.run"]


def test_the_command_prints_what_is_to_fix_and_its_status_says_it(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", str(tmp_path), "--json"],
        env={**os.environ, "RANK_TABLE_FILE": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert {each["what"] for each in json.loads(done.stdout) if each["mark"] == "!!"} >= {"RANK_TABLE_FILE"}
