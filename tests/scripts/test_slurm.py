"""The job scripts are sound shell, and a real Slurm runs, warns, requeues and finishes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from scripts.make_tiny_pipeline import write_prompts
from tests.support.job_templates import SCRIPTS, fill, marked_names
from tests.support.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster, wait_until

ONE_NODE, SEVERAL_NODES = SCRIPTS / "slurm" / "one_node.sbatch", SCRIPTS / "slurm" / "several_nodes.sbatch"
TEMPLATES = pytest.mark.parametrize("template", [ONE_NODE, SEVERAL_NODES], ids=lambda path: path.stem)


@TEMPLATES
def test_shellcheck_finds_nothing(template: Path) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run([program, template], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@TEMPLATES
def test_a_job_is_warned_before_the_launcher_gives_up_on_its_ranks(template: Path) -> None:
    text = template.read_text()
    warning = int(text.split("#SBATCH --signal=B:TERM@")[1].split()[0])
    patience = int(text.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[1].split()[0])
    assert patience < warning, "ranks that are not ready must be ended before Slurm ends everything"


@TEMPLATES
def test_nothing_is_left_to_fill_in_but_the_marked_lines(template: Path) -> None:
    text = template.read_text()
    filled = fill(text, dict.fromkeys(marked_names(text), "x"))
    assert "/path/to" not in filled
    assert "FILL IN" not in filled


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Return a cluster of two virtual nodes that serves all tests of this file."""
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("only root can start the daemons of Slurm")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class QueuedJob:
    """A filled template in the queue, and the folder it writes to."""

    def __init__(self, cluster: SlurmCluster, template: Path, folder: Path, pipeline: Path, **values: str) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        prompts = write_prompts(folder / "calib_prompts.txt")
        flags = (
            f"flux --path {pipeline} --device cpu --device_type A2-32g-dual --prompt_path {prompts}"
            f" --width 64 --height 64 --infer_steps 2 --max_num_prompt 3 --do_quant --quant_type w8a8_timestep"
            f" --quant_weight_save_folder {folder}/weights --quant_dump_calib_folder {folder}/dump"
        )
        common = {
            "cann": "",
            "python": sys.executable,
            "repository": str(SCRIPTS.parent),
            "visible_cards": "",
            "network": "lo",
            "most_restarts": "3",
            "job": f"({flags})",
            "--output": "job.log",
            "--cpus-per-task": "1",
        }
        script = folder / template.name
        script.write_text(fill(template.read_text(), common | values))
        self.number = cluster.submit(script, cwd=folder)

    @property
    def log(self) -> str:
        """What the job has said so far, over all its starts."""
        file = self.folder / "job.log"
        return file.read_text() if file.exists() else ""

    def digests(self) -> dict[str, str]:
        """Return the content of each published checkpoint file, by name."""
        files = sorted((self.folder / "weights").glob("quant_model_*"))
        return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def start_one_node(cluster: SlurmCluster, tmp_path: Path, pipeline: Path) -> QueuedJob:
    return QueuedJob(cluster, ONE_NODE, tmp_path / "one", pipeline, ranks="2")


def has_begun(job: QueuedJob) -> bool:
    """Whether the first prompt is through: from then on there is something to lose."""
    return "calibrate" in job.log


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_warned_job_is_requeued_and_ends_with_the_bytes_of_an_undisturbed_one(
    cluster: SlurmCluster, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    warned = start_one_node(cluster, tmp_path, tiny_flux_folder)
    wait_until(lambda: has_begun(warned), "calibration has begun", timeout_s=60)
    # What Slurm does two minutes before the time is up, because of --signal=B:TERM@120.
    cluster.call("scancel", "--batch", "--signal=TERM", warned.number)
    wait_until(lambda: "queued again" in warned.log, "the script asks for another start", timeout_s=30)
    assert "SIGTERM asked the job to leave" in warned.log, "the ranks stop at a safe point and are not killed"
    assert not (warned.folder / "weights" / "quant_manifest.json").exists()
    # Slurm lets a requeued job wait for some seconds: time for another one, on two hosts.
    undisturbed = QueuedJob(cluster, SEVERAL_NODES, tmp_path / "two", tiny_flux_folder, ranks="1", **{"--nodes": "2"})
    for job, restarts in ((warned, "1"), (undisturbed, "0")):
        ended = cluster.wait_for_end(job.number)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), job.log
    assert len(warned.digests()) == 4, "weights and description of two shards"
    assert warned.digests() == undisturbed.digests()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, tiny_flux_folder: Path, tmp_path: Path) -> None:
    job = start_one_node(cluster, tmp_path, tiny_flux_folder)
    wait_until(
        lambda: f"{job.number}.0" in cluster.call("squeue", "--steps", "--noheader"), "srun has started the launcher"
    )
    cluster.call("scancel", job.number)
    ended = cluster.wait_for_end(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "queued again" not in job.log


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_of_several_hosts_that_is_asked_to_stop_ends_with_the_status_that_queues_it_again(
    cluster: SlurmCluster, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    """Hosts end one after the other, and Slurm ends a step when its first host has ended."""
    job = QueuedJob(cluster, SEVERAL_NODES, tmp_path / "two", tiny_flux_folder, ranks="1", **{"--nodes": "2"})
    wait_until(lambda: has_begun(job), "calibration has begun", timeout_s=60)
    cluster.call("scancel", "--batch", "--signal=TERM", job.number)
    wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", "the job is queued again", timeout_s=30)
    cluster.call("scancel", job.number)
    ended = cluster.wait_for_end(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_fails_with_any_other_status_is_not_started_again(
    cluster: SlurmCluster, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    job = QueuedJob(cluster, ONE_NODE, tmp_path / "wrong", tiny_flux_folder, ranks="2", job="(flux --pth x)")
    ended = cluster.wait_for_end(job.number)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "no flag is called '--pth'" in job.log
