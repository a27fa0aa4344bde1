"""torchrun's flags stand in front of the command, ours behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.start.agent import agent_arguments
from launcher.start.supervisor_flags import asks_for_ranks, job_on_ranks, split_at_command
from quant_core.errors import ConfigurationError


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
