"""torchrun's flags stand in front of the command, ours behind it."""

from __future__ import annotations

import pytest

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
