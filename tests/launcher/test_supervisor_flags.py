"""torchrun's flags stand in front of the command, ours behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.failure.error_file import read_error_files, write_error_file
from launcher.failure.record import Failure
from launcher.start.agent import agent_arguments
from launcher.start.supervisor_flags import asks_for_ranks, job_on_ranks, split_at_command
from quant_core.errors import ConfigurationError, InputError


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--nproc_per_node", "2", "flux", "--path", "m"], True),
        (["--nproc-per-node=2", "--max-restarts", "1", "sd3"], True),
        (["--nproc_per_node", "2", "merge", "folder"], True),
        (["flux", "--path", "m"], False),
        (["flux", "--nproc_per_node", "2"], False),  # behind the command it is an unknown flag of the job
        (["--device", "cpu"], False),
        ([], False),
    ],
)
def test_the_number_of_processes_in_front_of_the_command_asks_for_ranks(words: list[str], asked: bool) -> None:
    assert asks_for_ranks(words) is asked


def test_the_first_command_divides_the_words() -> None:
    assert split_at_command(["--nnodes", "2", "sd3", "flux"]) == (["--nnodes", "2"], ["sd3", "flux"])


def test_a_command_that_works_on_files_is_refused_on_several_ranks() -> None:
    with pytest.raises(ConfigurationError, match="merge does not run on several ranks") as caught:
        job_on_ranks(["merge", "folder"])
    assert "leave out" in caught.value.advice


@pytest.mark.parametrize(("variable", "flags", "seconds"), [(None, [], 300), ("100", [], 100), ("100", ["7"], 7)])
def test_how_long_ranks_may_save_is_said_by_the_flag_or_the_variable_of_torchrun(
    variable: str | None, flags: list[str], seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)
    words = ["--nproc_per_node", "2", *(f"--shutdown_timeout={value}" for value in flags)]
    assert agent_arguments(words, ["-m", "launcher"], tmp_path).shutdown_timeout == seconds


@pytest.mark.parametrize("front", [["--nnodes", "2"], ["--standalone"], ["--rdzv-endpoint=host:1", "--node_rank", "1"]])
def test_flags_of_torchrun_without_the_number_of_ranks_say_that_it_is_missing(front: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="--nproc_per_node is missing") as caught:
        asks_for_ranks([*front, "flux", "--path", "m"])
    assert caught.value.advice == f"--nproc_per_node 2 {' '.join(front)} flux ..."


@pytest.mark.parametrize("count", ["0", "-1", "00"])
def test_no_ranks_are_refused_before_any_is_started(count: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--nproc_per_node {count} starts no rank"):
        agent_arguments([f"--nproc_per_node={count}"], ["-m", "launcher"], tmp_path)


@pytest.mark.parametrize("place", ["file", "file/logs"])
def test_a_file_in_the_place_of_the_folder_of_logs_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--nproc_per_node", "1", "--log-dir", str(tmp_path / place)]
    with pytest.raises(ConfigurationError, match="can be no folder") as caught:
        agent_arguments(words, ["-m", "launcher"], tmp_path)
    assert caught.value.where == "--log-dir"


def test_what_earlier_jobs_left_in_a_folder_for_logs_is_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--nproc_per_node", "1", "--log-dir", str(tmp_path)]
    (tmp_path / "attempt_to_quantize").mkdir()
    for attempt in (1, 0):  # the earlier job was restarted
        logs = Path(agent_arguments(words, ["-m", "launcher"], tmp_path / "unused").log_dir)
        assert logs.parent == tmp_path
        assert read_error_files(logs) == []
        errors = logs / "job" / f"attempt_{attempt}" / "0" / "error.json"
        errors.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(errors))
        write_error_file(Failure.of(InputError(f"attempt {attempt}"), 0), is_first=True)
        assert [failure.what for failure in read_error_files(logs)] == [f"attempt {attempt}"]
