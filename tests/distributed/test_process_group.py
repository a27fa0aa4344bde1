"""Real ranks find each other, share what they know, fail as one, and never wait for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.devices.launch import Launch
from launcher.failure.phases import run_together
from launcher.ranks.agreement import all_agree, barrier, gather_objects
from launcher.ranks.process_group import join, lay_out, part
from quant_core.errors import ConfigurationError, InputError
from tests.support.forked_ranks import run_forked
from tests.support.torchrun import ROOT, run_torchrun

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("process_group_worker.py")
# The configuration needs a model folder, but joining never looks into it.
FLAGS = ("flux", "--path", "model", "--do_save_img", "--device", "cpu", "--timeout_s", "60")
DUAL = (*FLAGS, "--device_type", "A2-32g-dual")


def reports_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


@pytest.fixture(scope="module", params=[2, 4])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw; one start serves all tests of this number of ranks, and that of four is torchrun's."""
    folder = tmp_path_factory.mktemp("reports")
    start = run_torchrun if request.param == 4 else run_forked
    done = start(request.param, WORKER, folder, *DUAL)
    assert done.returncode == 0, done.stderr[-4000:]
    return reports_in(folder)


def each(reports: list[dict[str, Any]], check: str) -> list[Any]:
    return [report["checks"][check] for report in reports]


def test_every_rank_knows_its_place(reports) -> None:
    world = len(reports)
    assert [report["rank"] for report in reports] == list(range(world))
    assert all(report["world"] == world and report["source"] == "torchrun" for report in reports)
    assert [report["mesh"] for report in reports] == [[rank // 2, rank % 2, 2] for rank in range(world)]


def test_every_rank_says_what_was_chosen_and_why(reports) -> None:
    text = "\n".join(reports[0]["reasons"])
    assert f"mesh: world {len(reports)} = dp {len(reports) // 2} × tp 2, tp 2: --device_type A2-32g-dual" in text
    for choice in ("device: cpu", "backend: gloo", "threads: "):
        assert choice in text


def test_groups_are_neighbours_for_tp_and_strides_for_dp(reports) -> None:
    world = len(reports)
    for report in reports:
        rank, groups = report["rank"], report["checks"]["groups"]
        neighbours = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert groups["control"]["members"] == list(range(world))
        assert groups["tp_device_group"]["members"] == groups["tp_control"]["members"] == neighbours
        assert groups["dp_control"]["members"] == list(range(rank % 2, world, 2))
        assert all(group["sum"] == sum(group["members"]) for group in groups.values())


def test_objects_are_gathered_in_the_order_of_ranks(reports) -> None:
    assert each(reports, "gathered") == [[{"rank": rank} for rank in range(len(reports))]] * len(reports)


def test_a_stage_returns_each_ranks_own_result(reports) -> None:
    assert each(reports, "result") == [rank * 10 for rank in range(len(reports))]


def test_one_no_makes_all_ranks_say_no(reports) -> None:
    assert all(each(reports, "all_yes"))
    assert not any(each(reports, "one_no"))


def test_the_error_of_one_rank_is_raised_on_all_with_its_kind_and_its_rank(reports) -> None:
    last = len(reports) - 1
    errors = each(reports, "one_fails")
    assert {error["text"] for error in errors} == {
        "error: weights are truncated\n"
        f"  where  rank {last}, quantize: w.safetensors\n"
        "  why    8 bytes are missing\n"
        "  try    copy again"
    }
    assert {error["status"] for error in errors} == {4}  # bad input
    assert [error["cause"] for error in errors] == ["NoneType"] * last + ["InputError"]


def test_who_says_nothing_takes_what_rank_0_says(reports) -> None:
    assert [found["value"] for found in each(reports, "alike")] == [{"seed": 42}] * len(reports)


def test_a_rank_that_differs_is_named_on_all_ranks_with_the_field(reports) -> None:
    last = len(reports) - 1
    for error in each(reports, "unlike"):
        assert f"rank 0 and rank {last} differ in the options" in error["text"]
        assert "why    last: False, True" in error["text"]
        assert error["status"] == 2


def test_an_error_of_all_ranks_is_told_once(reports) -> None:
    ranks = ", ".join(map(str, range(len(reports))))
    assert {error["text"].splitlines()[1] for error in each(reports, "all_fail_alike")} == {
        f"  where  ranks {ranks}, quantize: w.safetensors"
    }


def test_the_rank_that_failed_first_speaks_and_the_other_is_mentioned(reports) -> None:
    for error in each(reports, "first_speaks"):
        assert error["text"].startswith("error: ZeroDivisionError: of the last rank")
        assert f"where  rank {len(reports) - 1}, quantize" in error["text"]
        assert "then rank 0: weights are truncated" in error["text"]
        assert error["status"] == 1  # a bug


def test_running_out_of_memory_keeps_its_exit_status_on_all_ranks(reports) -> None:
    assert {error["status"] for error in each(reports, "out_of_memory")} == {5}


def test_after_an_error_the_ranks_are_still_in_step(reports) -> None:
    assert each(reports, "goes_on") == [list(range(len(reports)))] * len(reports)


def test_the_groups_are_taken_down_after_success(reports) -> None:
    assert all(report["left"] for report in reports)


def test_a_rank_that_stays_away_is_named_within_the_timeout(tmp_path: Path) -> None:
    done = run_forked(3, WORKER, tmp_path, *FLAGS, environ={"ABSENT_RANK": "last"})
    assert done.returncode == 0, done.stderr[-4000:]
    first, second, _absent = [report["absent"] for report in reports_in(tmp_path)]
    assert "error: rank 2 did not come to the merge" in first["text"]
    assert "rank 0 names" in second["text"]
    for waited in (first, second):
        assert waited["status"] == 6  # distributed
        assert waited["seconds"] < 2.5  # the wait is 1 s; the absent rank comes after 3 s


def test_who_has_finished_fails_no_more_when_another_rank_ends_without_a_goodbye(tmp_path: Path) -> None:
    done = run_forked(3, WORKER, tmp_path, *FLAGS, environ={"ABSENT_RANK": "last"})
    assert done.returncode == 0, done.stderr[-4000:]


def start(environ: dict[str, str], *words: str | Path) -> subprocess.Popen[str]:
    """Start one rank by hand, without torchrun."""
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_srun_without_torchrun_forms_the_same_groups(tmp_path: Path) -> None:
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": str(free_port() - 20000)}
    tasks = [start({**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}, tmp_path, *DUAL) for rank in "01"]
    for task in tasks:
        _, stderr = task.communicate(timeout=60)
        assert task.returncode == 0, stderr[-2000:]
    assert [(report["source"], report["world"]) for report in reports_in(tmp_path)] == [("srun", 2)] * 2


def free_port() -> int:
    """Find a port in 20000 to 39999, where a job's number leads."""
    for port in range(31000, 39999):
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def test_ranks_that_never_come_are_an_error_within_the_timeout(tmp_path: Path) -> None:
    one_of_two = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    _, stderr = start(one_of_two, tmp_path, *DUAL, "--timeout_s", "2").communicate(timeout=60)
    assert "error: the 2 ranks could not connect" in stderr
    assert "where  environment, gloo" in stderr


def config_of(*words: str) -> JobConfig:
    return parse(words).options


def test_a_single_process_needs_no_group_and_everything_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    ranks = join(config_of(*FLAGS), Launch())
    assert (ranks.rank, ranks.world, ranks.device, ranks.is_distributed) == (0, 1, torch.device("cpu"), False)
    assert gather_objects(ranks, "mine") == ["mine"]
    assert all_agree(ranks, True)
    assert not all_agree(ranks, False)
    assert run_together(ranks, "load", lambda: 7) == 7
    with pytest.raises(InputError, match="no"):
        run_together(ranks, "load", raise_input_error)
    barrier(ranks, "anything")
    part(ranks)
    torch.set_num_threads(threads)


def test_one_thread_is_used_where_the_user_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ranks = join(config_of(*FLAGS), Launch())
        assert torch.get_num_threads() == 1
        assert "threads: 1, OMP_NUM_THREADS=1" in ranks.reasons
    finally:
        torch.set_num_threads(before)


def said_of_threads(report: dict[str, Any]) -> str:
    return next(reason for reason in report["reasons"] if reason.startswith("threads: "))


def test_the_threads_that_the_user_set_are_not_called_torchruns_own(reports) -> None:
    assert not any("is torchrun's own" in said_of_threads(report) for report in reports)


def test_the_threads_that_torchrun_sets_are_called_its_own(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["env", "-u", "OMP_NUM_THREADS", *torchrun, str(WORKER), str(tmp_path), *FLAGS]
    inherited = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=inherited, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for report in reports_in(tmp_path):
        assert "is torchrun's own" in said_of_threads(report)


def raise_input_error() -> None:
    raise InputError("no")


@pytest.mark.parametrize(
    ("words", "world", "tp_size"),
    [
        (FLAGS, 2, 1),  # A2-64g, the default of FLUX: one card holds one copy
        (DUAL, 4, 2),
        ((*DUAL, "--tp_size", "4"), 4, 4),
        (("sd3", "--sd3_model_path", "m", "--do_save_img"), 4, 4),  # no device type: over the whole world
    ],
)
def test_the_mesh_follows_the_device_type_of_the_model(words: tuple[str, ...], world: int, tp_size: int) -> None:
    mesh, _reason = lay_out(config_of(*words), Launch(world=world))
    assert mesh.tp_size == tp_size


def test_a_dual_card_job_in_a_single_process_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigurationError, match="1 rank cannot form groups of 2"):
        join(config_of(*DUAL), Launch())
