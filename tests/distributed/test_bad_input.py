"""Every kind of bad input is refused with a message of its own, before any result is touched."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.cli.command_line import parse
from launcher.failure.error_file import read_error_files
from launcher.files.run_folder import MANIFEST, STAGING
from launcher.run import run
from quant_core.calibration.records import save_dump
from quant_core.errors import ConfigurationError, EnvironmentFailure, ExplainedError, InputError
from tests.support.torchrun import run_torchrun


@dataclass
class Job:
    """A sound job in one process, which a case then spoils; `words` are its command line."""

    root: Path
    model: Path
    prompts: Path
    words: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path, pipeline: Path) -> Job:
        """Copy the pipeline, write prompts, and ask for a quantization that would work."""
        job = cls(root, Path(shutil.copytree(pipeline, root / "model")), root / "prompts.txt")
        job.prompts.write_text("a red bus\na cat\n")
        job.prompts.chmod(0o640)
        job.words = [
            "flux", "--path", str(job.model), "--device", "cpu", "--prompt_path", str(job.prompts),
            "--width", "64", "--height", "64", "--infer_steps", "2", "--do_quant",
            "--quant_weight_save_folder", str(job.weights), "--quant_dump_calib_folder", str(job.dump.parent),
        ]  # fmt: skip
        return job

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def dump(self) -> Path:
        return self.root / "dumps" / "calib_data.pth"

    @property
    def tensors(self) -> Path:
        return self.model / "transformer" / "diffusion_pytorch_model.safetensors"

    @property
    def config(self) -> Path:
        return self.model / "transformer" / "config.json"

    def results(self) -> dict[str, bytes]:
        """Return every file that a consumer or a second run would read."""
        files = [*self.weights.glob("quant_*"), *self.weights.glob(f"{STAGING}/*"), *self.dump.parent.glob("*.pth")]
        return {str(path): path.read_bytes() for path in files}


Spoil = Callable[[Job], object]


def flags(*words: str) -> Spoil:
    """Add words to the command line; a later flag overrides an earlier one."""
    return lambda job: job.words.extend(words)


def words(*only: str) -> Spoil:
    """Replace the whole command line."""
    return lambda job: job.words.__setitem__(slice(None), only)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def reshape_a_tensor(job: Job) -> None:
    tensors = load_file(job.tensors)
    tensors["x_embedder.bias"] = tensors["x_embedder.bias"][:-1].clone()
    save_file(tensors, job.tensors)


def change_config(**fields: object) -> Spoil:
    return lambda job: job.config.write_text(json.dumps({**json.loads(job.config.read_text()), **fields}))


def without_guidance(job: Job) -> None:
    change_config(guidance_embeds=False)(job)
    tensors = {name: tensor for name, tensor in load_file(job.tensors).items() if "guidance" not in name}
    save_file(tensors, job.tensors)


def link_prompts(job: Job) -> None:
    target = job.prompts.rename(job.root / "elsewhere.txt")
    job.prompts.symlink_to(target)


def write(path: Callable[[Job], Path], content: str | bytes) -> Spoil:
    def spoil(job: Job) -> None:
        path(job).parent.mkdir(parents=True, exist_ok=True)
        path(job).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def dump_with(said: Mapping[str, object], **changes: object) -> Spoil:
    """Leave a complete dump that says something else of itself."""

    def spoil(job: Job) -> None:
        save_dump(job.dump, [{"args": [], "kwargs": {"x": torch.ones(1)}, "timestep_idx": 0}], said)
        torch.save({**torch.load(job.dump), **changes}, job.dump)

    return spoil


class Malicious:
    """What a pickle may hold: a call."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("executed",)


def dump_code(job: Job) -> None:
    job.dump.parent.mkdir()
    torch.save({"format": Malicious()}, job.dump)


def truncated_dump(job: Job) -> None:
    dump_with({})(job)
    cut_in_half(job.dump)


PROMPTS, DUMP, CONFIG = (lambda job: job.prompts), (lambda job: job.dump), (lambda job: job.config)
MANIFEST_FILE = lambda job: job.weights / MANIFEST  # noqa: E731
NOTE = lambda job: job.weights / STAGING / "quant_shard_note_w8a8_timestep.json"  # noqa: E731
OF_ANOTHER = {"version": 1, "quant_type": "W8A8", "fingerprint": "f", "fields": {"prompts.count": 24}} | {
    "layout": "mindie", "tp_size": 1, "dp_size": 1, "files": []
}  # fmt: skip

HEUN = "FlowMatchHeunDiscreteScheduler"

CASES: dict[str, tuple[Spoil, type[ExplainedError], str]] = {
    # what the model and the ranks refuse
    "unknown layout": (flags("--layout", "mindy"), ConfigurationError, "flux has no layout 'mindy'"),
    "more ranks a copy than ranks": (flags("--tp_size", "2"), ConfigurationError, "1 rank cannot form groups of 2"),
    "pattern that matches nothing": (flags("--disable_names", "conext"), ConfigurationError, "conext"),
    # the model
    "model folder that is missing": (flags("--path", "no/such/model"), InputError, "there is no model folder"),
    "model folder that is a file": (lambda job: flags("--path", str(job.prompts))(job), InputError, "is a file"),
    "model without a configuration": (lambda job: job.config.unlink(), InputError, "config.json is missing"),
    "configuration that is no JSON": (write(CONFIG, "{"), InputError, "config.json cannot be read"),
    "configuration of another class": (change_config(_class_name="UNet"), InputError, "is a UNet, not a Flux"),
    "impossible model": (change_config(num_attention_heads="two"), InputError, "can be built from config.json"),
    "model without weights": (lambda job: job.tensors.unlink(), InputError, "transformer/ has no weights"),
    "truncated weights": (lambda job: cut_in_half(job.tensors), InputError, "cannot be read"),
    "weights of another kind": (write(lambda job: job.tensors, b"PK\3\4"), InputError, "cannot be read"),
    "weights of another shape": (reshape_a_tensor, InputError, "the weights do not fit the model"),
    "index that names a missing file": (
        write(
            lambda job: job.model / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
            '{"weight_map": {"a": "b.safetensors"}}',
        ),
        InputError,
        "b.safetensors is missing",
    ),
    "tokenizer without a folder": (
        lambda job: shutil.rmtree(job.model / "tokenizer_2"),
        InputError,
        "tokenizer_2/ has no vocabulary",
    ),
    "tokenizer without half of its vocabulary": (
        lambda job: (job.model / "tokenizer" / "merges.txt").unlink(),
        InputError,
        "tokenizer/ has no vocabulary",
    ),
    "truncated text encoder": (
        lambda job: cut_in_half(job.model / "text_encoder_2" / "model.safetensors"),
        InputError,
        "the FluxPipeline around the transformer cannot be loaded",
    ),
    "scheduler that the pipeline cannot use": (
        write(lambda job: job.model / "scheduler" / "scheduler_config.json", json.dumps({"_class_name": HEUN})),
        InputError,
        f"FluxPipeline cannot use the scheduler {HEUN}",
    ),
    "guidance for a model that reads none": (
        lambda job: (without_guidance(job), flags("--guidance_scale", "3.5")(job)),
        ConfigurationError,
        "--guidance_scale 3.5 has no meaning for this transformer",
    ),
    # the prompts
    "prompts that are missing": (lambda job: job.prompts.unlink(), InputError, "there is no such prompt file"),
    "prompts without a prompt": (write(PROMPTS, " \n\n"), InputError, "the prompt file holds no prompt"),
    "prompts that others may read": (lambda job: job.prompts.chmod(0o644), InputError, "the prompt file is refused"),
    "prompts behind a link": (link_prompts, InputError, "the prompt file is refused"),
    "prompts that are a folder": (lambda job: flags("--prompt_path", str(job.root))(job), InputError, "is refused"),
    "prompts in another encoding": (write(PROMPTS, b"\xff\xfeA\0"), InputError, "the prompt file cannot be read"),
    "prompts of another format": (flags("--prompt_type", "hpsv2"), InputError, "is not a hpsv2 prompt file"),
    "fewer prompts than parts": (flags("--data_split_num", "3"), ConfigurationError, "2 cannot be shared out over 3"),
    # what an earlier run left
    "dump of another job": (dump_with({"fields": {"prompts.count": 24}}), InputError, "made by another job"),
    "dump of another version": (dump_with({}, version=99), InputError, "this is no calibration dump"),
    "dump that was not finished": (dump_with({}, complete=False), InputError, "this is no calibration dump"),
    "dump with records of another kind": (dump_with({}, records=7), InputError, "this is no calibration dump"),
    "dump without a header": (dump_with({}, header=None), InputError, "this is no calibration dump"),
    "truncated dump": (truncated_dump, InputError, "the file cannot be read as torch data"),
    "empty dump": (write(DUMP, b""), InputError, "the file cannot be read as torch data"),
    "dump that would run code": (dump_code, InputError, "the file holds objects that must not be loaded"),
    "pickle for a dump": (
        write(DUMP, pickle.dumps([Malicious()])),
        InputError,
        "the file cannot be read as torch data",
    ),
    "checkpoint of another job": (
        write(MANIFEST_FILE, json.dumps(OF_ANOTHER)),
        InputError,
        "the output folder holds the checkpoint of another job",
    ),
    "manifest that is no JSON": (write(MANIFEST_FILE, "{"), InputError, "the manifest of a checkpoint cannot be read"),
    "images where a file is": (
        lambda job: flags("--do_save_img", "--save_path", str(job.prompts))(job),
        ConfigurationError,
        "is a file",
    ),
    "nothing to merge": (
        lambda job: words("merge", "--quant_weight_save_folder", str(job.root))(job),
        InputError,
        "there are no staged shards to merge",
    ),
    "note that is no JSON": (
        lambda job: (write(NOTE, "{")(job), words("merge", "--quant_weight_save_folder", str(job.weights))(job)),
        InputError,
        "the note of a staged shard cannot be read",
    ),
    # the machine
    "device that is not there": (flags("--device", "npu"), EnvironmentFailure, "torch_npu"),
}

ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "a world without a local rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but LOCAL_RANK is not"),
    "a local rank without the rest": ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set without"),
    "several hosts without torchrun": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
        "srun started tasks on 2 hosts without torchrun",
    ),
}


def refuse(job: Job) -> ExplainedError:
    """Run the command in this process and return its error; a job without its watch, which would end the process."""

    def execute() -> None:
        asked = parse(job.words)
        if asked.command.on_ranks:
            run(asked.options)
        else:
            asked.run(None)

    with pytest.raises(ExplainedError) as caught:
        execute()
    return caught.value


@pytest.fixture
def job(tmp_path: Path, tiny_flux_folder: Path) -> Job:
    return Job.make(tmp_path, tiny_flux_folder)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_its_own_message_and_touches_no_result(name: str, job: Job) -> None:
    spoil, kind, message = CASES[name]
    spoil(job)
    before = job.results()
    error = refuse(job)
    assert isinstance(error, kind), error
    assert message in error.what, error
    assert error.where
    assert error.advice
    assert job.results() == before


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_rank_variables_that_contradict_each_other_are_refused(
    name: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, message = ENVIRONMENTS[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    error = refuse(job)
    assert isinstance(error, EnvironmentFailure)
    assert message in error.what


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("spoil", "message", "status"),
    [
        (flags("--tp_size", "4"), "error: 2 ranks cannot form groups of 4", 2),
        (lambda job: (cut_in_half(job.tensors), flags("--tp_size", "2")(job)), "cannot be read", 4),
    ],
)
def test_all_ranks_end_with_one_error_of_four_lines(
    spoil: Spoil, message: str, status: int, job: Job, tmp_path: Path
) -> None:
    spoil(job)
    done = run_torchrun(2, "-m", "launcher", *job.words, torchrun_flags=["--log-dir", str(tmp_path / "agent")])
    assert done.returncode == 1  # all that torchrun ever says
    before_summary = done.stderr.split("Traceback (most recent call last)")[0]
    assert before_summary.count("error: ") == 1, done.stderr
    assert message in before_summary
    assert "traceback : error: " in done.stderr  # torchrun's summary shows our lines, not a traceback
    told = read_error_files(tmp_path / "agent")
    assert {failure.exit_code for failure in told} == {status}
