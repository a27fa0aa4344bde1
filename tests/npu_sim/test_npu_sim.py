"""The launcher on `--device npu`: the real torch_npu wheel on a simulated CANN ("npu-sim").

What this proves and what it cannot is in README.md beside this file. No NPU was used.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.make_tiny_pipeline import write_prompts
from tests.npu_sim.build import Simulation, Unavailable, prepare
from tests.support.torchrun import ROOT, Finished, run_torchrun

HERE = Path(__file__).parent
# Installing the wheels takes a minute, and much longer on a slow network.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    try:
        return prepare()
    except Unavailable as reason:
        if os.environ.get("NPU_SIM_REQUIRED"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))


# What a job of each name runs with: how many cards, and the words. Every job has one static and one dynamic step.
JOBS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "flux, two cards": (2, ("flux", "--device_type", "A2-32g-dual", "--quant_type", "w8a8_timestep")),
    "flux, one card, offloaded": (
        1,
        ("flux", "--device_type", "A2-32g-single", "--quant_type", "w8a8_dynamic_fa3", "--do_save_img"),
    ),
    "flux, one card, streamed": (1, ("flux", "--quant_type", "w8a8_dynamic", "--calibrate", "needed")),
    "sd3, two cards": (2, ("sd3", "--quant_type", "w8a8")),
}


@dataclass(frozen=True)
class Job:
    """A finished job's folder."""

    folder: Path

    @property
    def flags(self) -> list[str]:
        weights, dumps = self.folder / "weights", self.folder / "dumps"
        images = ["--save_path", str(self.folder / "images"), "--info_file_save_path", str(self.folder / "info.json")]
        return ["--quant_weight_save_folder", str(weights), "--quant_dump_calib_folder", str(dumps), *images]

    def shards(self) -> dict[str, dict[str, torch.Tensor]]:
        return {path.name: load_file(path) for path in sorted((self.folder / "weights").glob("*.safetensors"))}

    def texts(self) -> dict[str, str]:
        found = sorted((self.folder / "weights").glob("quant_model_description_*.json"))
        return {path.name: path.read_text() for path in found}

    def images(self) -> dict[str, bytes]:
        found = sorted((self.folder / "images").rglob("*.png"))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def records(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        dumps = sorted((self.folder / "dumps").glob("*.pth"))
        return {
            path.name: [record["kwargs"] for record in torch.load(path, weights_only=True)["records"]] for path in dumps
        }

    def calls(self, rank: int) -> list[str]:
        return (self.folder / f"calls_{rank}.txt").read_text().splitlines()


def job_words(name: str, folders: Mapping[str, Path], prompts: Path, *more: str) -> list[str]:
    """Return a small job of that name."""
    model, *words = JOBS[name][1]
    path = "--sd3_model_path" if model == "sd3" else "--path"
    # torch_npu pads what it gathers to a multiple of 512 bytes, with a kernel that is not simulated: not at this size.
    sizes = ["--width", "64", "--height", "64", "--infer_steps", "2", "--max_num_prompt", "2"]
    return [model, path, str(folders[model]), "--prompt_path", str(prompts), *sizes, *words, "--do_quant", *more]


def run_job(simulation: Simulation, words: list[str], environ: dict[str, str], cards: int = 2) -> Finished:
    script = HERE / "run_launcher.py"
    return run_torchrun(cards, script, *words, environ=environ, python=simulation.python, timeout_s=280)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def folders(tiny_flux_folder: Path, tiny_sd3_folder: Path) -> dict[str, Path]:
    return {"flux": tiny_flux_folder, "sd3": tiny_sd3_folder}


@pytest.fixture(scope="module")
def finished(
    simulation: Simulation, folders: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Job]]:
    """Return a function that runs a job on simulated NPUs and, in the same environment without CANN, on the CPU."""

    @cache
    def run(name: str) -> dict[str, Job]:
        made = {}
        for device in ("npu", "cpu"):
            job = made[device] = Job(tmp_path_factory.mktemp(device))
            cann = simulation.environ(NPU_SIM_LOG=str(job.folder)) if device == "npu" else {}
            environ = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **cann}
            words = job_words(name, folders, prompts, "--device", device, *job.flags)
            done = run_job(simulation, words, environ, cards=JOBS[name][0])
            assert done.returncode == 0, done.stderr[-3000:]
        return made

    return run


@pytest.fixture(params=JOBS)
def jobs(request: pytest.FixtureRequest, finished: Callable[[str], dict[str, Job]]) -> dict[str, Job]:
    """Each job, by device."""
    return finished(request.param)


def test_the_simulation_computes_and_communicates_like_the_cpu(simulation: Simulation) -> None:
    done = run_torchrun(2, HERE / "simulation_worker.py", environ=simulation.environ(), python=simulation.python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(re.findall(r"rank (\d) is right", done.stdout)) == ["0", "1"]


def test_what_is_published_equals_that_of_the_cpu_bit_by_bit(jobs: dict[str, Job]) -> None:
    """Not the files' bytes: their header holds the fingerprint, and the device is a part of that."""
    on_npu, on_cpu = jobs["npu"].shards(), jobs["cpu"].shards()
    assert list(on_npu) == list(on_cpu)
    for shard, tensors in on_npu.items():
        assert list(tensors) == list(on_cpu[shard])
        assert len(tensors) > 200  # tens of quantized layers with up to eight tensors each: nothing was left out
        assert [name for name in tensors if not torch.equal(tensors[name], on_cpu[shard][name])] == []
        assert [name for name in tensors if tensors[name].dtype != on_cpu[shard][name].dtype] == []
    assert jobs["npu"].texts() == jobs["cpu"].texts()


def test_the_calibration_data_and_the_images_are_the_cpus_too(jobs: dict[str, Job]) -> None:
    on_npu, on_cpu = jobs["npu"].records(), jobs["cpu"].records()
    assert list(on_npu) == list(on_cpu)
    for rank, records in on_npu.items():
        assert len(records) == len(on_cpu[rank]) == 4  # 2 prompts, 2 steps
        for here, there in zip(records, on_cpu[rank]):
            tensors = {name: value for name, value in here.items() if isinstance(value, torch.Tensor)}
            assert "hidden_states" in tensors
            assert all(torch.equal(value, there[name]) for name, value in tensors.items())
    assert jobs["npu"].images() == jobs["cpu"].images()


def test_a_card_that_holds_one_block_at_a_time_makes_images_of_both_models(finished) -> None:
    names = [f"images/calib_{kind}/{prompt}_0.png" for kind in ("fp", "quant") for prompt in range(2)]
    assert list(finished("flux, one card, offloaded")["npu"].images()) == names


@pytest.mark.parametrize("rank", [0, 1])
def test_cann_sees_the_calls_in_their_order(finished, rank: int) -> None:
    """The device is this rank's before HCCL connects; then one communicator, of the model's ranks, small buffers."""
    calls = finished("flux, two cards")["npu"].calls(rank)
    connected = calls.index("HcclCommConfig hccl_buffer_size=64")
    # The last: torch_npu itself begins on device 0 in every process, whatever is set first.
    assert [call for call in calls[:connected] if call.startswith("aclrtSetDevice")][-1] == f"aclrtSetDevice {rank}"
    assert "aclSetCompileopt ACL_OP_JIT_COMPILE disable" in calls[:connected]
    assert "aclSetCompileopt ACL_OP_JIT_COMPILE enable" not in calls
    assert [call for call in calls if call.startswith("HcclCommInit")] == [f"HcclCommInit ranks=2 rank={rank}"]


def test_a_card_that_stops_answering_ends_the_job_with_an_explained_error(
    simulation: Simulation, folders: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    limits = {"HCCL_EXEC_TIMEOUT": "5", "HCCL_CONNECT_TIMEOUT": "120"}
    environ = simulation.environ(**limits, NPU_SIM_SILENT_RANK="1")
    words = job_words("flux, two cards", folders, prompts, "--device", "npu", *Job(tmp_path).flags)
    done = run_job(simulation, words, environ)
    assert done.returncode == 1, "torchrun says 1 for any failure"
    said = re.search(r"^error: (.*)\n  where  (.*)\n  why    (.*)\n  try    (.*)$", done.stderr, re.MULTILINE)
    assert said is not None, done.stderr[-3000:]
    assert said[1] == "a collective on the NPUs timed out (EI0002)"
    assert "HCCL_EXEC_TIMEOUT" in said[4]
    assert re.search(r"exitcode +: 6 ", done.stderr), "of the rank that waited"
    assert not (tmp_path / "weights" / "quant_manifest.json").exists()


def test_without_cann_the_error_comes_at_once_and_says_what_to_source(simulation: Simulation, tmp_path: Path) -> None:
    """The wheel is installed, set_env.sh was not sourced; no variable is set that job scripts export."""
    command = [str(simulation.python), "-m", "launcher", "flux", "--path", "model", "--do_save_img", "--device", "npu"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--save_path", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr
    assert time.monotonic() - start < 60  # seconds on an idle machine: importing torch and diffusers, nothing else
    first, *rest = done.stderr[done.stderr.index("error:") :].splitlines()
    assert first == "error: torch_npu is installed but cannot be imported"
    assert len(rest) == 3
    assert ".so: cannot open shared object file" in rest[1]
    assert "set_env.sh" in rest[2]


def test_a_local_rank_without_a_device_names_the_variable_that_hides_cards(
    simulation: Simulation, tmp_path: Path
) -> None:
    environ = simulation.environ(devices=1, ASCEND_RT_VISIBLE_DEVICES="3")
    words = ["flux", "--path", "model", "--device", "npu", "--device_type", "A2-32g-dual"]
    output = ["--do_save_img", "--save_path", tmp_path]
    done = run_torchrun(2, "-m", "launcher", *words, *output, environ=environ, python=simulation.python)
    assert re.search(r"exitcode +: 3 ", done.stderr), done.stderr[-3000:]
    assert "npu 1 does not exist: this process sees 1" in done.stderr
    assert "ASCEND_RT_VISIBLE_DEVICES=3" in done.stderr
    assert "npu-smi info" in done.stderr
