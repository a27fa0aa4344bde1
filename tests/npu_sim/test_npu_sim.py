"""The launcher on `--device npu`: the real torch_npu wheel on a simulated CANN ("npu-sim").

What this proves and what it cannot is in README.md beside this file. No NPU was used.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Job:
    """A finished job's folders."""

    folder: Path

    @property
    def flags(self) -> list[str]:
        weights, dumps = self.folder / "weights", self.folder / "dumps"
        return ["--quant_weight_save_folder", str(weights), "--quant_dump_calib_folder", str(dumps)]

    def tensors(self, tp_rank: int) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "weights" / f"quant_model_weight_w8a8_timestep_{tp_rank}.safetensors")

    def description(self, tp_rank: int) -> str:
        return (self.folder / "weights" / f"quant_model_description_w8a8_timestep_{tp_rank}.json").read_text()

    def records(self, rank: int) -> list[dict[str, torch.Tensor]]:
        dump = torch.load(self.folder / "dumps" / f"calib_data_rank{rank}.pth", weights_only=True)
        return [record["kwargs"] for record in dump["records"]]

    def calls(self, rank: int) -> list[str]:
        return (self.folder / f"calls_{rank}.txt").read_text().splitlines()


def job_words(pipeline: Path, prompts: Path, *more: str) -> list[str]:
    """Return the smallest FLUX job that uses every stage, with one static and one dynamic step."""
    words = ["flux", "--path", str(pipeline), "--device_type", "A2-32g-dual", "--prompt_path", str(prompts)]
    # torch_npu pads what it gathers to a multiple of 512 bytes, with a kernel that is not simulated: not at this size.
    sizes = ["--width", "64", "--height", "64", "--infer_steps", "2", "--max_num_prompt", "2"]
    return [*words, *sizes, "--do_quant", "--quant_type", "w8a8_timestep", *more]


def run_job(simulation: Simulation, words: list[str], environ: dict[str, str]) -> Finished:
    return run_torchrun(2, HERE / "run_launcher.py", *words, environ=environ, python=simulation.python, timeout_s=280)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def jobs(
    simulation: Simulation, tiny_flux_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Job]:
    """Run the two-rank job on simulated NPUs and, in the same environment without CANN, on the CPU."""
    made: dict[str, Job] = {}
    for device in ("npu", "cpu"):
        job = made[device] = Job(tmp_path_factory.mktemp(device))
        cann = simulation.environ(NPU_SIM_LOG=str(job.folder)) if device == "npu" else {}
        environ = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **cann}
        done = run_job(simulation, job_words(tiny_flux_folder, prompts, "--device", device, *job.flags), environ)
        assert done.returncode == 0, done.stderr[-3000:]
    return made


def test_the_simulation_computes_and_communicates_like_the_cpu(simulation: Simulation) -> None:
    done = run_torchrun(2, HERE / "simulation_worker.py", environ=simulation.environ(), python=simulation.python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(re.findall(r"rank (\d) is right", done.stdout)) == ["0", "1"]


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_published_shards_equal_those_of_the_cpu_bit_by_bit(jobs: dict[str, Job], tp_rank: int) -> None:
    """Not the files' bytes: their header holds the fingerprint, and the device is a part of that."""
    on_npu, on_cpu = jobs["npu"].tensors(tp_rank), jobs["cpu"].tensors(tp_rank)
    assert list(on_npu) == list(on_cpu)
    assert len(on_npu) > 300  # 45 quantized layers with up to eight tensors each: nothing was left out
    assert [name for name in on_npu if not torch.equal(on_npu[name], on_cpu[name])] == []
    assert [name for name in on_npu if on_npu[name].dtype != on_cpu[name].dtype] == []
    assert jobs["npu"].description(tp_rank) == jobs["cpu"].description(tp_rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_calibration_data_are_the_cpus_too(jobs: dict[str, Job], rank: int) -> None:
    on_npu, on_cpu = jobs["npu"].records(rank), jobs["cpu"].records(rank)
    assert len(on_npu) == len(on_cpu) == 4  # 2 prompts, 2 steps
    for here, there in zip(on_npu, on_cpu):
        tensors = {name: value for name, value in here.items() if isinstance(value, torch.Tensor)}
        assert "hidden_states" in tensors
        assert all(torch.equal(value, there[name]) for name, value in tensors.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_cann_sees_the_calls_in_their_order(jobs: dict[str, Job], rank: int) -> None:
    """The device is this rank's before HCCL connects; then one communicator, of the model's ranks, small buffers."""
    calls = jobs["npu"].calls(rank)
    connected = calls.index("HcclCommConfig hccl_buffer_size=64")
    # The last: torch_npu itself begins on device 0 in every process, whatever is set first.
    assert [call for call in calls[:connected] if call.startswith("aclrtSetDevice")][-1] == f"aclrtSetDevice {rank}"
    assert "aclSetCompileopt ACL_OP_JIT_COMPILE disable" in calls[:connected]
    assert "aclSetCompileopt ACL_OP_JIT_COMPILE enable" not in calls
    assert [call for call in calls if call.startswith("HcclCommInit")] == [f"HcclCommInit ranks=2 rank={rank}"]


def test_a_card_that_stops_answering_ends_the_job_with_an_explained_error(
    simulation: Simulation, tiny_flux_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    limits = {"HCCL_EXEC_TIMEOUT": "5", "HCCL_CONNECT_TIMEOUT": "120"}
    environ = simulation.environ(**limits, NPU_SIM_SILENT_RANK="1")
    done = run_job(simulation, job_words(tiny_flux_folder, prompts, "--device", "npu", *Job(tmp_path).flags), environ)
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
