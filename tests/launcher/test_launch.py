"""Which rank a process is follows from its launcher's variables, and broken ones are refused."""

from __future__ import annotations

import pytest

from launcher.devices.launch import Launch, read_launch
from quant_core.errors import EnvironmentFailure

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_JOB_ID": "70001",
}


def test_without_a_launcher_there_is_one_process() -> None:
    found = read_launch({})
    assert found == Launch()
    assert not found.is_distributed


def test_torchrun_tells_rank_local_rank_and_world() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "torchrun", "env://")


def test_one_process_under_torchrun_is_distributed() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_launch({**TORCHRUN, **alone, "GROUP_WORLD_SIZE": "1"}).is_distributed


def test_variables_that_a_scheduler_gives_each_pod_do_not_make_a_rank() -> None:
    assert read_launch({"RANK": "3", "WORLD_SIZE": "1"}) == Launch()


def test_srun_on_one_host_works_without_torchrun_on_a_port_of_the_job() -> None:
    found = read_launch(SRUN)
    # 70001 modulo 20000 is 10001, above the base of 20000.
    assert found == Launch(1, 2, 1, 2, "srun", "tcp://127.0.0.1:30001/70001.0")


def test_steps_of_one_job_have_each_a_port_of_their_own() -> None:
    steps = {read_launch({**SRUN, "SLURM_STEP_ID": str(step)}).init_method for step in range(3)}
    assert steps == {f"tcp://127.0.0.1:{30001 + 1000 * step}/70001.{step}" for step in range(3)}


def test_torchrun_inside_srun_is_torchrun() -> None:
    assert read_launch({**SRUN, **TORCHRUN}).source == "torchrun"


def test_a_batch_script_outside_srun_is_a_single_process() -> None:
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Launch()


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({**TORCHRUN, "MASTER_ADDR": ""}, "LOCAL_RANK=1 is set without MASTER_ADDR"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "is set without WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but LOCAL_RANK is not"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "one host runs 4 of WORLD_SIZE=8 ranks"),
        ({**TORCHRUN, "RANK": "one"}, "RANK must be a number"),
        ({**TORCHRUN, "RANK": "-1", "WORLD_SIZE": "x"}, "RANK and WORLD_SIZE must be a number"),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2"}, "srun started tasks on 2 hosts without torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID and SLURM_LOCALID must be a number"),
    ],
)
def test_broken_variables_are_refused_and_shown(environ: dict[str, str], what: str) -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        read_launch(environ)
    assert what in caught.value.what
    assert "=" in caught.value.where
    assert "torchrun" in caught.value.advice
    assert len(str(caught.value).splitlines()) == 4
